"""Fine-tuning on samples, on `trl.SFTTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from trl.trainers.sft import SFTConfig as TrlSFTConfig
from trl.trainers.sft import SFTTrainer
from trlx.data.method_configs import MethodConfig, register_method
from trlx.models.modeling_ppo import GEN_KWARGS
from trlx.pipeline.offline_pipeline import dialogue_rows
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from trlx.trainer.options import adapter_config, batches_of, steps_of_epochs
from trlx.trainer.schedules import Scheduled


@dataclass
@register_method
class SFTConfig(MethodConfig):
    """Supervised fine-tuning on samples."""

    name: str = "SFTConfig"

    gen_kwargs: dict[str, Any] = field(default_factory=lambda: dict(GEN_KWARGS))
    """Sampling options of evaluation, which runs once per value of an option that is a list."""


class _SFTTrainer(Scheduled, SFTTrainer):
    """`SFTTrainer` with the learning-rate schedule of a `scheduler` section."""


@register_trainer
class AccelerateSFTTrainer(AccelerateRLTrainer):
    """Fine-tunes on all tokens of samples that are texts, and on the outputs of dialogues. Arguments: see
    `AccelerateRLTrainer`."""

    method_class = SFTConfig

    def add_samples(self, samples: Sequence[Any], rewards: Sequence[Any] | None = None) -> None:
        length = self.config.train.seq_length
        self.rows = Dataset.from_list(dialogue_rows(samples, self.tokenizer, length, encoder_decoder=self.seq2seq))

    def make_trainer(self) -> SFTTrainer:
        train = self.config.train
        args = TrlSFTConfig(
            **self.common_options(),
            max_steps=steps_of_epochs(train, batches_of(len(self.rows), train)),
            max_length=None,
        )
        self.freeze()
        return _SFTTrainer(
            self.given_model,
            args,
            train_dataset=self.rows,
            scheduler=self.config.scheduler,
            peft_config=adapter_config(self.config.model.peft_config),
            **self.common_keywords(),
        )
