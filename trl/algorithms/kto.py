"""Losses of unpaired completions, each labelled desirable or undesirable: KTO, APO-zero, BCO.

    h(y) = log π(y|x) − log π_ref(y|x),       s = +1 where y is desirable, −1 where it is not

    KTO        1 − σ(β s [h − z₀])        z₀ = KL(π ‖ π_ref), the reference point of gains and losses
    APO-zero   1 − σ(β s h)               KTO with z₀ = 0
    BCO        −log σ(s [β h − δ])        δ = ½ (E[β h | desirable] + E[β h | undesirable])

z₀ is a statistic of the whole batch (`kl_estimate`), δ one of all batches so far (`RewardShift`). The losses take them as
inputs without gradient, so that the split into micro-batches does not matter.

All tensors are `[N]`, one number per completion; `desirable` is boolean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.algorithms.pairs import by_preference
from trl.algorithms.signals import required
from trl.errors import ConfigError, DataError
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.option_types import check_choices
from trl.types import Batch, Metrics, Scores

KTO_WEIGHT_RATIO = (1.0, 4.0 / 3.0)
"""Range of (λ_D n_D) / (λ_U n_U) that arXiv:2402.01306 recommends."""


@shapes(logratio="N", desirable="N")
def kto(logratio: Tensor, desirable: Tensor, kl: Tensor, *, beta: float) -> Tensor:
    """1 − σ(β s [h − z₀]) with `kl` for z₀ (a scalar, or `[N]`). KTO, arXiv:2402.01306, for λ = 1."""
    return torch.sigmoid(-beta * _sign(desirable, logratio) * (logratio - kl))


@shapes(logratio="N", desirable="N")
def apo_zero_unpaired(logratio: Tensor, desirable: Tensor, *, beta: float) -> Tensor:
    """1 − σ(β s h). APO-zero, arXiv:2408.06266, Eq. 7, for unpaired completions."""
    return torch.sigmoid(-beta * _sign(desirable, logratio) * logratio)


@shapes(logratio="N", desirable="N")
def bco(logratio: Tensor, desirable: Tensor, delta: Tensor, *, beta: float) -> Tensor:
    """−log σ(s [β h − δ]): binary classification whose logit is the reward β h, shifted by δ. BCO, arXiv:2404.04656."""
    return -F.logsigmoid(_sign(desirable, logratio) * (beta * logratio - delta))


def _sign(desirable: Tensor, like: Tensor) -> Tensor:
    return torch.where(desirable, 1.0, -1.0).to(like.dtype)


@shapes(logratio="M")
@torch.no_grad()
def kl_estimate(logratio: Tensor) -> Tensor:
    """z₀ = max(0, mean h(y_j | x_i)) of mismatched completions, j ≠ i, `[M]`: a scalar without gradient.

    `logratio` should cover the whole batch of all processes. The estimate is biased, but needs no samples of π.
    KTO, arXiv:2402.01306, Section 4.
    """
    return logratio.mean().clamp(min=0)


@dataclass(frozen=True, slots=True)
class RewardShift:
    """Running averages of the rewards of desirable and undesirable completions, for BCO's δ; they start at 0."""

    desirable_sum: Tensor
    desirable_count: Tensor
    undesirable_sum: Tensor
    undesirable_count: Tensor

    @classmethod
    def start(cls, device: torch.device | str = "cpu") -> RewardShift:
        return cls(*torch.zeros(4, dtype=torch.float64, device=device).unbind())

    @torch.no_grad()
    def update(self, rewards: Tensor, desirable: Tensor) -> RewardShift:
        """Return the averages after adding `rewards [N]` = β h."""
        bad = ~desirable
        return RewardShift(
            self.desirable_sum + (rewards * desirable).sum(),
            self.desirable_count + desirable.sum(),
            self.undesirable_sum + (rewards * bad).sum(),
            self.undesirable_count + bad.sum(),
        )

    @property
    def delta(self) -> Tensor:
        """δ, a scalar: the midpoint of the two averages. arXiv:2404.04656."""
        desirable = self.desirable_sum / self.desirable_count.clamp(min=1)
        undesirable = self.undesirable_sum / self.undesirable_count.clamp(min=1)
        return 0.5 * (desirable + undesirable)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A loss `formula(logratio, desirable[, signal], beta=…) -> [N]`, and the name of the signal it takes, if any."""

    formula: Callable[..., Tensor]
    signal: str | None = None


LOSSES: dict[str, Unpaired] = {
    "kto": Unpaired(kto, "kl"),
    "apo_zero_unpaired": Unpaired(apo_zero_unpaired),
    "bco": Unpaired(bco, "delta"),
}
"""Losses by their names in `loss_type`."""


@dataclass(kw_only=True)
class KTOOptions:
    """Hyperparameters of the losses; the trainer's configuration inherits them."""

    beta: float = 0.1
    """β: strength of the KL regularisation towards the reference policy."""

    loss_type: Literal["kto", "apo_zero_unpaired", "bco"] = "kto"
    """"kto" (arXiv:2402.01306), "apo_zero_unpaired" (arXiv:2408.06266) or "bco" (arXiv:2404.04656)."""

    desirable_weight: float = 1.0
    """λ_D ≥ 0, weight of desirable completions. λ_D n_D / (λ_U n_U) should be between 1 and 4/3."""

    undesirable_weight: float = 1.0
    """λ_U ≥ 0, weight of undesirable completions."""


@dataclass(kw_only=True)
class KTO(KTOOptions):
    """KTO, APO-zero or BCO as an algorithm.

    Reads the signals `ref_logprobs [N,C]`, `label [N]` (1 desirable, 0 undesirable), and the one that `needs_signal` names:
    `kl [N]` or `delta [N]`, the same number for every completion of an optimizer step.
    """

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.beta > 0:
            raise ConfigError(f"beta must be positive, got {self.beta}.")
        check_bounds(self)

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_signal(self) -> str | None:
        """Name of the batch statistic that the loss reads as a signal: "kl", "delta" or None."""
        return LOSSES[self.loss_type].signal

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of every completion `[N]`, and metrics `[N]`."""
        logprob = (scores.logprobs * batch.mask).sum(-1)
        logratio = logprob - (self._signal(batch, "ref_logprobs") * batch.mask).sum(-1)
        desirable = self._signal(batch, "label") > 0.5
        statistic = {} if self.needs_signal is None else {self.needs_signal: self._signal(batch, self.needs_signal)}
        loss = LOSSES[self.loss_type].formula(logratio, desirable, *statistic.values(), beta=self.beta)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(loss.dtype)
        metrics = unpaired_metrics(self.beta * logratio, logprob, desirable) | statistic
        return weight * loss, metrics

    def _signal(self, batch: Batch, name: str) -> Tensor:
        return required(batch, name, by=f"loss_type={self.loss_type!r}")


@shapes(rewards="N", logprob="N", desirable="N")
def unpaired_metrics(rewards: Tensor, logprob: Tensor, desirable: Tensor) -> Metrics:
    """Metrics `[N]`: rewards and log-probabilities, split by label; NaN, which averages leave out, for the other label."""
    return by_preference("rewards", rewards, desirable) | by_preference("logps", logprob, desirable)


def with_margin(averages: Mapping[str, float]) -> dict[str, float]:
    """Add `rewards/margins` to averaged metrics: for unpaired data, the difference of two averages."""
    if not {"rewards/chosen", "rewards/rejected"} <= averages.keys():
        return dict(averages)
    margin = averages["rewards/chosen"] - averages["rewards/rejected"]
    return {**averages, "rewards/margins": margin}


@dataclass(frozen=True, slots=True)
class WeightRanges:
    """Recommended ranges of λ_D and λ_U for unbalanced labels: change one of them, and keep the other."""

    ratio: float
    desirable: tuple[float, float]
    undesirable: tuple[float, float]

    @property
    def met(self) -> bool:
        low, high = KTO_WEIGHT_RATIO
        return low <= self.ratio <= high


def recommended_weights(
    desirable: int, undesirable: int, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> WeightRanges:
    """Ranges of λ_D and of λ_U in which 1 ≤ (λ_D n_D) / (λ_U n_U) ≤ 4/3, for n_D and n_U labelled completions.

    The total weight of desirable completions should equal that of undesirable ones, or exceed it a little.
    KTO, arXiv:2402.01306, Section 4.
    """
    if desirable < 1 or undesirable < 1:
        raise DataError(
            f"KTO needs desirable and undesirable completions; column 'label' has {desirable} true and {undesirable} false."
        )
    low, high = KTO_WEIGHT_RATIO
    good, bad = desirable_weight * desirable, undesirable_weight * undesirable
    return WeightRanges(
        ratio=good / bad,
        desirable=(low * bad / desirable, high * bad / desirable),
        undesirable=(good / (high * undesirable), good / (low * undesirable)),
    )
