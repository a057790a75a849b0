"""Losses of reward models, trained on comparisons, on absolute scores, or on labels of reasoning steps.

    comparisons   −log σ(r_w − r_l − m) + c (r_w + r_l)²        Bradley–Terry, with optional margin m, centring weight c
    scores        (r − s)²
    steps         −y log σ(r_t) − (1 − y) log σ(−r_t)           at the last token t of every step

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
    """−log σ(r_w − r_l − m), `[P]`: negative log-likelihood of the preference; m is a margin between the rewards.

    InstructGPT, arXiv:2203.02155, Eq. 1; with the margin Llama 2, arXiv:2307.09288, Eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margin)


@shapes(chosen="P", rejected="P")
def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)², `[P]`: centres rewards at 0, since comparisons do not determine their offset. arXiv:2312.09244."""
    return (chosen + rejected).square()


@shapes(rewards="N", score="N")
def regression(rewards: Tensor, score: Tensor) -> Tensor:
    """Squared error (r − s)², `[N]`, of rewards r and target scores s."""
    return (rewards - score).square()


@shapes(rewards="...", label="...")
def step_binary(rewards: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy of "this step is right", from logits r and labels y in [0, 1]; `[N,C]` each.

    Process supervision, arXiv:2305.20050; Math-Shepherd, arXiv:2312.08935, Eq. 2, with soft labels as in its Eq. 4.
    """
    return F.binary_cross_entropy_with_logits(rewards, label, reduction="none")


@dataclass(frozen=True, slots=True)
class PairwiseReward:
    """Bradley–Terry loss of pairs. Reads m, if given, from `batch.signals["margin"] [N]` of the chosen completion."""

    center_rewards_coefficient: float | None = None
    """c: weight of (r_w + r_l)²; arXiv:2312.09244 uses 0.01. None: rewards are not centred."""

    def __post_init__(self) -> None:
        check_bounds(self)

    def loss(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of every pair `[P]`, from `rewards [N]`; metrics `[P]` and `[N]`."""
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
    """Regression to absolute scores, `batch.signals["score"] [N]`."""

    def loss(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of every completion `[N]`, from `rewards [N]`; metrics `[N]`."""
        loss = regression(rewards, required(batch, "score", by="Regression of scores"))
        error = {"absolute_error": loss.detach().sqrt()}
        return loss, error | reward_metrics(rewards)


@dataclass(frozen=True, slots=True)
class StepReward:
    """Process supervision: `batch.mask` marks the last token of a step, `batch.signals["step_label"] [N,C]` labels it."""

    def loss(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]`, 0 where masked and to be averaged over the mask, from logits `rewards [N,C]`; metrics `[N,C]`."""
        label = required(batch, "step_label", by="Process supervision").to(rewards.dtype)
        agreement = ((rewards.detach() > 0) == (label > 0.5)).to(rewards.dtype)
        return step_binary(rewards, label) * batch.mask, {"accuracy": agreement, "mean_reward": rewards.detach()}


@shapes(rewards="N")
def reward_metrics(rewards: Tensor) -> Metrics:
    """Rewards `[N]` as three metrics, which the log reduces to their mean, minimum and maximum."""
    rewards = rewards.detach()
    return {"mean_reward": rewards, "min_reward": rewards, "max_reward": rewards}
