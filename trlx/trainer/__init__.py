"""Trainers by name."""

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
"""A decorator that makes a trainer of one's own known by its name, or by the one that it is given."""


class BaseRLTrainer:
    """What `trlx.train` asks of a trainer. One's own derives from it, or from one of those that are here.

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
        """What to sample from in training."""
        raise ConfigError(
            f"train.trainer={self.config.train.trainer!r} learns from samples: give samples, and no reward_fn."
        )

    def add_samples(self, samples: Sequence[Any], rewards: Sequence[Any] | None) -> None:
        """What to learn from."""
        raise ConfigError(
            f"train.trainer={self.config.train.trainer!r} samples by itself: give prompts and a reward_fn."
        )

    def add_eval_prompts(self, prompts: Sequence[Any], max_prompt_length: int) -> None:
        """What to sample from in evaluation."""
        raise NotImplementedError

    def learn(self) -> Mapping[str, float]:
        """Train; gives the metrics of the last evaluation."""
        raise NotImplementedError
