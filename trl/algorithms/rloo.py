"""REINFORCE with a baseline, and its leave-one-out and globally normalised forms.

    RLOO          A_i = r_i − mean of the others' r_j                     Ahmadian et al. 2024, arXiv:2402.14740, Eq. 8
                      = G/(G−1) (r_i − mean r)
    REINFORCE++   A_i = (r_i − mean) / std over the whole rollout batch   Hu et al. 2025, arXiv:2501.03262
    REINFORCE     A_i = r_i − mean over the whole rollout batch           Williams 1992

RLOO treats a completion as one action: its ratio is that of the whole completion, and the KL from the reference is part of
its reward. On the samples of the current policy the gradient is A ∇log π(y), clipping plays no role.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trl.algorithms.advantages import Baseline, Scale, advantages
from trl.algorithms.grpo import GRPO, RatioLevel
from trl.errors import ConfigError
from trl.types import Experience


@dataclass(frozen=True, kw_only=True)
class RLOO(GRPO):
    """The other samples of the prompt are the baseline."""

    baseline: Baseline = "leave_one_out"
    scale: Scale = "none"
    ratio_level: RatioLevel = "whole"
    beta: float = 0.05
    kl_in_reward: bool = True
    reward_clip_range: tuple[float, float] | None = None
    """Bounds that rewards are clipped to, before the KL penalty."""
    normalize_advantages: bool = False
    """Give the advantages of a rollout batch mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds = self.reward_clip_range
        if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ConfigError(f"reward_clip_range={bounds}: give two numbers, the lowest reward and the highest.")

    def advantages(self, experience: Experience) -> Experience:
        if self.reward_clip_range is not None:
            experience = replace(experience, rewards=experience.rewards.clamp(*self.reward_clip_range))
        experience = super().advantages(experience)
        if not self.normalize_advantages:
            return experience
        known = experience.signals["advantages"].masked_fill(experience.rewards.isnan(), float("nan"))
        return experience.with_signals(advantages=advantages(known, experience.group, baseline="batch", scale="batch"))


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(GRPO):
    """Advantages normalised over the rollout batch, a token's ratio clipped, KL in the reward.

    With `baseline="group"` it is the paper's REINFORCE++-baseline, for several samples of a prompt.
    """

    baseline: Baseline = "batch"
    scale: Scale = "batch"
    kl_in_reward: bool = True


@dataclass(frozen=True, kw_only=True)
class Reinforce(GRPO):
    """Plain REINFORCE: the rollout batch's mean is the baseline."""

    baseline: Baseline = "batch"
    scale: Scale = "none"
    kl_in_reward: bool = True
