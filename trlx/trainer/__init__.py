"""Base class of trainers, and their registry by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl.errors import ConfigError
from trlx.data.configs import TRLConfig
from trlx.utils.registry import Registry

TRAINERS = Registry(
    "trainer",
    {
        f"Accelerate{kind}Trainer": f"trlx.trainer.accelerate_{kind.lower()}_trainer"
        for kind in ("PPO", "ILQL", "SFT", "RFT")
    },
)


register_trainer = TRAINERS.register
"""Decorator that registers a trainer class, under its own name or a given one."""


class BaseRLTrainer:
    """Interface that `trlx.train` needs of a trainer. Derive your own from it, or from one of the registered trainers.

    config          the run's configuration
    reward_fn       (samples, prompts, outputs, tokenizer, **columns) -> rewards
    metric_fn       (samples, prompts, outputs, **columns) -> {name: one number per sample}
    stop_sequences  texts at which outputs end
    """

    def __init__(
        self,
        config: TRLConfig,
        reward_fn: Callable | None = None,
        metric_fn: Callable | None = None,
        stop_sequences: Sequence[str] | None = None,
    ) -> None:
        self.config = config
        self.reward_fn, self.metric_fn = reward_fn, metric_fn
        self.stop_sequences = list(stop_sequences or ())

    def add_prompts(self, prompts: Sequence[Any], max_prompt_length: int) -> None:
        """Set the prompts that training samples from."""
        raise ConfigError(
            f"train.trainer={self.config.train.trainer!r} learns from samples: give samples, without reward_fn."
        )

    def add_samples(self, samples: Sequence[Any], rewards: Sequence[Any] | None) -> None:
        """Set the samples to train on, with their rewards."""
        raise ConfigError(
            f"train.trainer={self.config.train.trainer!r} samples by itself: give prompts and a reward_fn."
        )

    def add_eval_prompts(self, prompts: Sequence[Any], max_prompt_length: int) -> None:
        """Set the prompts that evaluation samples from."""
        raise NotImplementedError

    def learn(self) -> Mapping[str, float]:
        """Train, and return the metrics of the last evaluation."""
        raise NotImplementedError
