"""REINFORCE with a baseline, RLOO (leave-one-out baseline) and REINFORCE++ (globally normalised).

    RLOO          A_i = r_i − mean of the others' r_j                     Ahmadian et al. 2024, arXiv:2402.14740, Eq. 8
                      = G/(G−1) (r_i − mean r)
    REINFORCE++   A_i = (r_i − mean) / std over the whole rollout batch   Hu et al. 2025, arXiv:2501.03262
    REINFORCE     A_i = r_i − mean over the whole rollout batch           Williams 1992

RLOO treats a completion as one action: ρ is the ratio of the whole completion, and the KL to the reference is subtracted
from its reward. On-policy, where ρ = 1, nothing is clipped and the gradient is A ∇log π(y).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trl.algorithms.advantages import Baseline, Scale, advantages
from trl.algorithms.grpo import GRPO, RatioLevel
from trl.errors import ConfigError
from trl.types import Experience


@dataclass(frozen=True, kw_only=True)
class RLOO(GRPO):
    """RLOO: the baseline is the mean reward of the prompt's other samples."""

    baseline: Baseline = "leave_one_out"
    scale: Scale = "none"
    ratio_level: RatioLevel = "whole"
    beta: float = 0.05
    kl_in_reward: bool = True
    reward_clip_range: tuple[float, float] | None = None
    """Lowest and highest reward, to which rewards are clipped before the KL penalty. None: no clipping."""
    normalize_advantages: bool = False
    """Normalise the advantages of a rollout batch to mean 0 and standard deviation 1."""

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
    """REINFORCE++: advantages normalised over the rollout batch, ratios clipped per token, KL in the reward.

    `baseline="group"` gives the paper's REINFORCE++-baseline, for several samples per prompt.
    """

    baseline: Baseline = "batch"
    scale: Scale = "batch"
    kl_in_reward: bool = True


@dataclass(frozen=True, kw_only=True)
class Reinforce(GRPO):
    """Plain REINFORCE: the baseline is the mean reward of the rollout batch."""

    baseline: Baseline = "batch"
    scale: Scale = "none"
    kl_in_reward: bool = True
