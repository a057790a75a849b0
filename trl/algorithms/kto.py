"""Losses of single completions that are labelled desirable or undesirable: KTO, APO-zero, BCO.

    h(y) = log π(y|x) − log π_ref(y|x),       s = +1 where y is desirable, −1 where it is not

    KTO        1 − σ(β s [h − z₀])        z₀ = KL(π ‖ π_ref), the point from which gains and losses are felt
    APO-zero   1 − σ(β s h)               KTO with z₀ = 0
    BCO        −log σ(s [β h − δ])        δ = ½ (E[β h | desirable] + E[β h | undesirable])

z₀ and δ are statistics of more completions than the loss is taken of. They come in as signals, without gradient, so
that the loss does not depend on how a batch was split: `kl_estimate` and `RewardShift` make them.

Everything is `[N]`, one number per completion; `desirable` is boolean.
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
    """1 − σ(β s h). APO-zero, arXiv:2408.06266, Eq. 7, one completion at a time."""
    return torch.sigmoid(-beta * _sign(desirable, logratio) * logratio)


@shapes(logratio="N", desirable="N")
def bco(logratio: Tensor, desirable: Tensor, delta: Tensor, *, beta: float) -> Tensor:
    """−log σ(s [β h − δ]): a classifier whose logit is the reward. BCO, arXiv:2404.04656."""
    return -F.logsigmoid(_sign(desirable, logratio) * (beta * logratio - delta))


def _sign(desirable: Tensor, like: Tensor) -> Tensor:
    return torch.where(desirable, 1.0, -1.0).to(like.dtype)


@shapes(logratio="M")
@torch.no_grad()
def kl_estimate(logratio: Tensor) -> Tensor:
    """z₀ = max(0, mean h(y_j | x_i)) of mismatched completions, j ≠ i, `[M]`: a scalar without gradient.

    The prompts and completions should be those of the whole batch, from all processes: a biased estimate, but one that
    needs no samples. KTO, arXiv:2402.01306, Section 4.
    """
    return logratio.mean().clamp(min=0)


@dataclass(frozen=True, slots=True)
class RewardShift:
    """Running averages of desirable and undesirable rewards, for BCO's δ; zero before anything was seen."""

    desirable_sum: Tensor
    desirable_count: Tensor
    undesirable_sum: Tensor
    undesirable_count: Tensor

    @classmethod
    def start(cls, device: torch.device | str = "cpu") -> RewardShift:
        return cls(*torch.zeros(4, device=device).unbind())

    @torch.no_grad()
    def update(self, rewards: Tensor, desirable: Tensor) -> RewardShift:
        """The averages with `rewards [N]` = β h taken in."""
        bad = ~desirable
        return RewardShift(
            self.desirable_sum + (rewards * desirable).sum(),
            self.desirable_count + desirable.sum(),
            self.undesirable_sum + (rewards * bad).sum(),
            self.undesirable_count + bad.sum(),
        )

    @property
    def delta(self) -> Tensor:
        """δ, a scalar: halfway between the two averages. arXiv:2404.04656."""
        desirable = self.desirable_sum / self.desirable_count.clamp(min=1)
        undesirable = self.undesirable_sum / self.undesirable_count.clamp(min=1)
        return 0.5 * (desirable + undesirable)


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A formula `formula(logratio, desirable[, signal], beta=…) -> [N]`, and the name of the signal it needs."""

    formula: Callable[..., Tensor]
    signal: str | None = None


LOSSES: dict[str, Unpaired] = {
    "kto": Unpaired(kto, "kl"),
    "apo_zero_unpaired": Unpaired(apo_zero_unpaired),
    "bco": Unpaired(bco, "delta"),
}
"""Names of `loss_type`."""


@dataclass(kw_only=True)
class KTOOptions:
    """What the losses are tuned by. A trainer's configuration has these options too."""

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
    """The losses as an algorithm.

    Needs of `batch.signals`: `ref_logprobs [N,C]`, `label [N]` (1 desirable, 0 not), and what `needs_signal` names:
    `kl [N]` or `delta [N]`, the same number for every completion of the window.
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
        """The statistic that enters as a signal: "kl", "delta" or none."""
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
    """Rewards and log-probabilities `[N]` by label: a completion of the other label is NaN, hence left out."""
    return by_preference("rewards", rewards, desirable) | by_preference("logps", logprob, desirable)


def with_margin(averages: Mapping[str, float]) -> dict[str, float]:
    """Averaged metrics with `rewards/margins`: of unpaired data it is a difference of averages, not an average."""
    if not {"rewards/chosen", "rewards/rejected"} <= averages.keys():
        return dict(averages)
    margin = averages["rewards/chosen"] - averages["rewards/rejected"]
    return {**averages, "rewards/margins": margin}


@dataclass(frozen=True, slots=True)
class WeightRanges:
    """Which weights make up for unequal classes: either of the two ranges, with the other weight as it is."""

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

    Desirable ones should count as much as undesirable ones, or a little more. KTO, arXiv:2402.01306, Section 4.
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
