"""Rejection-sampling fine-tuning, on `trl.RFTTrainer`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.errors import ConfigError
from trl.trainers.rft import RFTConfig as TrlRFTConfig
from trl.trainers.rft import RFTTrainer
from trlx.data.method_configs import MethodConfig, register_method
from trlx.models.modeling_ppo import GEN_KWARGS
from trlx.trainer import register_trainer
from trlx.trainer.accelerate_base_trainer import AccelerateRLTrainer
from trlx.trainer.options import adapter_config, batches_of, processes, sampling_options, steps_of_epochs
from trlx.trainer.prompted import Prompted
from trlx.trainer.schedules import Scheduled


@dataclass
@register_method
class RFTConfig(MethodConfig):
    """Fine-tune on the best of the policy's own samples."""

    name: str = "RFTConfig"

    gen_kwargs: dict[str, Any] = field(default_factory=lambda: dict(GEN_KWARGS))
    """Sampling options; evaluation runs once per value of an option that is a list."""

    start_percentile: float = 0.7
    """Percentile of a prompt's rewards that a sample must reach to be kept, in the first epoch on new samples."""

    end_percentile: float = 0.95
    """The same percentile in the last epoch on the same samples."""

    n_improve_steps: int = 4
    """Epochs on the same samples, before new ones are drawn."""

    n_generations_per_prompt: int = 32
    """Samples per prompt."""


class _RFTTrainer(Scheduled, Prompted, RFTTrainer):
    """`RFTTrainer` with a `scheduler` section and tokenised prompts."""


@register_trainer
class AccelerateRFTTrainer(AccelerateRLTrainer):
    """Samples from the prompts, keeps samples at or above a rising percentile, and fine-tunes on them.

    Each epoch is an improvement step on samples of all prompts. Its number of optimizer steps is fixed: as many batches of
    `train.batch_size` as there are samples above the mean of both percentiles.
    """

    method_class = RFTConfig
    with_extras = False

    def add_prompts(self, prompts: Sequence[Any], max_prompt_length: int) -> None:
        self.rows = self.prompt_rows(prompts, max_prompt_length)

    def make_trainer(self) -> RFTTrainer:
        train, method = self.config.train, self.config.method
        if self.reward_fn is None:
            raise ConfigError("RFTConfig needs a reward_fn, and prompts.")
        kept = 1 - (method.start_percentile + method.end_percentile) / 2
        steps = max(1, round(batches_of(kept * len(self.rows) * method.n_generations_per_prompt, train)))
        options = self.common_options()
        args = TrlRFTConfig(
            **options,
            **sampling_options(method.gen_kwargs),
            steps_per_generation=steps * options["gradient_accumulation_steps"],
            num_prompts=math.ceil(len(self.rows) / processes()),
            num_generations=method.n_generations_per_prompt,
            start_percentile=method.start_percentile,
            end_percentile=method.end_percentile,
            n_improve_steps=method.n_improve_steps,
            max_steps=steps_of_epochs(train, steps),
        )
        self.freeze()
        return _RFTTrainer(
            self.given_model,
            self.script_reward(folder=self.rollout_folder),
            args,
            self.rows,
            params=self.train_params(),
            scheduler=self.config.scheduler,
            peft_config=adapter_config(self.config.model.peft_config),
            **self.common_keywords(),
        )
