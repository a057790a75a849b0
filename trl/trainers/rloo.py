"""REINFORCE leave-one-out: the baseline is the mean reward of a prompt's other samples (arXiv:2402.14740).

    A_i = r_i − mean of the others' r,      r less β log π/π_ref;      see `trl.algorithms.rloo`

RLOOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=short, train_dataset=prompts).train()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl.algorithms.rloo import RLOO
from trl.algorithms.surrogates import Clip
from trl.errors import ConfigError
from trl.trainers.online import OnlineTrainer
from trl.trainers.online_config import LossAggregation, OnlineConfig


@dataclass
class RLOOConfig(OnlineConfig):
    """Options of `RLOOTrainer`."""

    ALIASES: ClassVar[dict[str, str]] = {
        **OnlineConfig.ALIASES,
        "rloo_k": "num_generations",
        "kl_coef": "beta",
        "cliprange": "epsilon",
        "num_ppo_epochs": "num_iterations",
        "normalize_advantage": "normalize_advantages",
    }

    num_generations: int = 2

    beta: float = 0.05
    """Coefficient of the KL penalty in the reward. 0: no reference model is loaded."""

    epsilon: float = 0.2
    """The ratio π/π_old of a completion is clipped below at 1 − epsilon."""

    epsilon_high: float | None = None
    """The ratio is clipped above at 1 + epsilon_high. None: as `epsilon`."""

    normalize_advantages: bool = False
    """Normalise the advantages of a rollout batch to mean 0 and standard deviation 1."""

    reward_clip_range: tuple[float, float] | None = None
    """Clip rewards to this lowest and highest value, before the KL penalty."""

    loss_aggregation: LossAggregation = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ConfigError(
                f"num_generations={self.num_generations}: RLOO needs at least 2 completions of each prompt."
            )
        self.make_algorithm()

    def make_algorithm(self) -> RLOO:
        """The algorithm that these options describe."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return RLOO(
            surrogate=Clip(self.epsilon, high),
            beta=self.beta,
            reward_clip_range=None if self.reward_clip_range is None else tuple(self.reward_clip_range),
            normalize_advantages=self.normalize_advantages,
        )


class RLOOTrainer(OnlineTrainer):
    """Sample groups of completions, and raise the probability of those whose reward is above the mean of the others.

    Arguments: see `OnlineTrainer`.
    """

    config_class = RLOOConfig
    args: RLOOConfig
