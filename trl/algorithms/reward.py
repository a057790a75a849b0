"""Reward models: numbers for completions, learned from comparisons, from scores, or step by step.

    comparisons   −log σ(r_w − r_l − m) + c (r_w + r_l)²        Bradley–Terry, with optional margin m and centring c
    scores        (r − s)²
    steps         −y log σ(r_t) − (1 − y) log σ(−r_t)           at the end of every step t

P pairs, N completions (N = 2P where they are pairs, chosen at even index, rejected at odd), C tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from trl.algorithms.pairs import split_pairs
from trl.algorithms.signals import required
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.types import Batch, Metrics


@shapes(chosen="P", rejected="P", margin="P")
def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """−log σ(r_w − r_l − m), `[P]`: the negative log-probability that the chosen completion wins, by more than m.

    InstructGPT, arXiv:2203.02155, Eq. 1; with the margin Llama 2, arXiv:2307.09288, Eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margin)


@shapes(chosen="P", rejected="P")
def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)², `[P]`: holds the offset that comparisons leave open at zero. arXiv:2312.09244."""
    return (chosen + rejected).square()


@shapes(rewards="N", score="N")
def regression(rewards: Tensor, score: Tensor) -> Tensor:
    """(r − s)², `[N]`."""
    return (rewards - score).square()


@shapes(rewards="...", label="...")
def step_binary(rewards: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of "this step is right", of logits r and labels in [0, 1]; `[N,C]` each.

    Process supervision, arXiv:2305.20050; soft labels as in Math-Shepherd, arXiv:2312.08935, Eq. 1.
    """
    return F.binary_cross_entropy_with_logits(rewards, label, reduction="none")


@dataclass(frozen=True, slots=True)
class PairwiseReward:
    """Comparisons. Uses `batch.signals["margin"] [N]` if it is there: the chosen completion's."""

    center_rewards_coefficient: float | None = None
    """c, weight of (r_w + r_l)²; arXiv:2312.09244 uses 0.01. None leaves the offset free."""

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of every pair `[P]` of `rewards [N]`; metrics `[P]` and `[N]`."""
        chosen, rejected = split_pairs(rewards)
        margin = split_pairs(batch.signals["margin"])[0] if "margin" in batch.signals else 0.0
        loss = bradley_terry(chosen, rejected, margin)
        if self.center_rewards_coefficient:
            loss = loss + self.center_rewards_coefficient * centring(chosen, rejected)
        difference = (chosen - rejected).detach()
        agreement = {"accuracy": (difference > 0).to(difference.dtype), "margin": difference}
        return loss, agreement | reward_metrics(rewards)


@dataclass(frozen=True, slots=True)
class ScoreRegression:
    """Absolute scores, `batch.signals["score"] [N]`."""

    def loss(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of every completion `[N]` of `rewards [N]`; metrics `[N]`."""
        loss = regression(rewards, required(batch, "score", by="Regression of scores"))
        error = {"absolute_error": loss.detach().sqrt()}
        return loss, error | reward_metrics(rewards)


@dataclass(frozen=True, slots=True)
class StepReward:
    """Process rewards: `batch.mask` marks the tokens that end a step, `batch.signals["step_label"] [N,C]` labels them."""

    def loss(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of every step end `[N,C]` of logits `rewards [N,C]` (to be averaged over the mask); metrics `[N,C]`."""
        label = required(batch, "step_label", by="Process supervision").to(rewards.dtype)
        agreement = ((rewards.detach() > 0) == (label > 0.5)).to(rewards.dtype)
        return step_binary(rewards, label) * batch.mask, {"accuracy": agreement, "mean_reward": rewards.detach()}


@shapes(rewards="N")
def reward_metrics(rewards: Tensor) -> Metrics:
    """Rewards `[N]` under three names: to be averaged, and reduced to the smallest and the largest."""
    rewards = rewards.detach()
    return {"mean_reward": rewards, "min_reward": rewards, "max_reward": rewards}
