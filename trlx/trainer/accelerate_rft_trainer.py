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
    """Imitate the best of one's own samples."""

    name: str = "RFTConfig"

    gen_kwargs: dict[str, Any] = field(default_factory=lambda: dict(GEN_KWARGS))
    """Options of sampling; one that is a list is swept in evaluation."""

    start_percentile: float = 0.7
    """Percentile of a prompt's rewards that its samples have to reach at first."""

    end_percentile: float = 0.95
    """The same percentile in the last epoch before new samples are drawn."""

    n_improve_steps: int = 4
    """Epochs for which the same samples are selected from."""

    n_generations_per_prompt: int = 32
    """Samples of each prompt."""


class _RFTTrainer(Scheduled, Prompted, RFTTrainer):
    """`RFTTrainer` with a scheduler and prompts of this interface."""


@register_trainer
class AccelerateRFTTrainer(AccelerateRLTrainer):
    """Samples from the prompts, keeps what reaches a rising percentile, and imitates it.

    Of every epoch, which is an improvement step, all prompts have their samples; the kept ones are learned from in as many
    batches of about `train.batch_size` as half way between both percentiles takes.
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
