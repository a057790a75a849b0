"""DPO (direct preference optimisation) and its family: losses of pairs of log-ratios, and the algorithm that sums them.

    h(y) = log π(y|x) − log π_ref(y|x),       DPO: −log σ(β [h(y_w) − h(y_l)])

π is optimal for the reward β h under a KL penalty towards π_ref (arXiv:2305.18290, Eq. 5), so a preference model of rewards
becomes a loss of log-ratios. The variants change the preference model, or pull h(y_w) and h(y_l) to targets of their own.

y_w is the chosen, y_l the rejected completion; `chosen` and `rejected` `[P]` are their h, or another score. Losses are `[P]`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.algorithms import pairs
from trl.algorithms.f_dpo import F_DIVERGENCES
from trl.algorithms.pairs import Side
from trl.algorithms.policy_gradient import MAX_EXPONENT
from trl.algorithms.reference_free import alphapo, cpo, logistic, orpo, sft, simpo
from trl.algorithms.signals import required
from trl.errors import ConfigError, unknown
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.option_types import check_choices
from trl.types import Batch, Metrics, Scores


@shapes(chosen="P", rejected="P")
def sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β [h_w − h_l]): Bradley–Terry. `label_smoothing` is the probability ε that a label is wrong (cDPO).

    "sigmoid_norm" is the same on length-normalised log-ratios. DPO, arXiv:2305.18290, Eq. 7.
    """
    return logistic(beta * (chosen - rejected), label_smoothing)


@shapes(chosen="P", rejected="P")
def hinge(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 − β [h_w − h_l]): no gradient beyond the margin 1/β. SLiC as in RSO, arXiv:2309.06657."""
    return F.relu(1 - beta * (chosen - rejected))


@shapes(chosen="P", rejected="P")
def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(h_w − h_l − 1/(2β))², of log-ratios per token: regression to the margin 1/(2β); β is the paper's τ.

    IPO, arXiv:2310.12036, Eq. 17; the authors' own results use log-ratios divided by length.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


@shapes(chosen="P", rejected="P")
def exo_pair(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(q ‖ p), q = (σ(d), σ(−d)) with d = β [h_w − h_l], p = (1−ε, ε), ε > 0; DPO minimises KL(p ‖ q).

    EXO, arXiv:2402.00856, Eq. 16.
    """
    d = beta * (chosen - rejected)
    correct = d.sigmoid() * (F.logsigmoid(d) - math.log1p(-label_smoothing))
    wrong = (-d).sigmoid() * (F.logsigmoid(-d) - math.log(label_smoothing))
    return correct + wrong


@shapes(chosen="P", rejected="P")
def robust(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """[−(1−ε) log σ(d) + ε log σ(−d)] / (1 − 2ε), d = β [h_w − h_l]; 0 ≤ ε < ½.

    Its expectation over labels that are flipped with probability ε is DPO's loss of the true labels.
    Robust DPO, arXiv:2403.00409.
    """
    d, e = beta * (chosen - rejected), label_smoothing
    return (-(1 - e) * F.logsigmoid(d) + e * F.logsigmoid(-d)) / (1 - 2 * e)


@shapes(chosen="P", rejected="P")
def discopop(chosen: Tensor, rejected: Tensor, *, beta: float, discopop_tau: float) -> Tensor:
    """(1 − m) log(1 + e^−d) + m e^−d, d = β [h_w − h_l], m = σ(d/τ): a loss that a language model discovered.

    Not convex: around d = 0 it rises with d for small τ. DiscoPOP, arXiv:2406.08414, Eq. 5.
    """
    d = beta * (chosen - rejected)
    exponential = torch.exp((-d).clamp(max=MAX_EXPONENT))
    return torch.lerp(-F.logsigmoid(d), exponential, torch.sigmoid(d / discopop_tau))


@shapes(chosen="P", rejected="P")
def nca_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """−log σ(β h_w) − ½ [log σ(−β h_w) + log σ(−β h_l)]: keeps the likelihood of y_w from falling.

    NCA, arXiv:2402.05369.
    """
    pull = -F.logsigmoid(beta * chosen)
    push = -F.logsigmoid(-beta * chosen) - F.logsigmoid(-beta * rejected)
    return pull + 0.5 * push


@shapes(chosen="P", rejected="P")
def bco_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """−log σ(β h_w) − log σ(−β h_l): binary classification with logit β h; an upper bound of DPO's loss.

    BCO, arXiv:2404.04656, without the reward shift δ, for which see `kto.bco`.
    """
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


@shapes(chosen="P", rejected="P")
def sppo_hard(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(h_w − 1/(2β))² + (h_l + 1/(2β))²: regression to win probabilities 1 and 0; β is the paper's 1/η.

    SPPO, arXiv:2405.00675, Eq. 4.7.
    """
    target = 1 / (2 * beta)
    return (chosen - target).square() + (rejected + target).square()


@shapes(chosen="P", rejected="P")
def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """1 − σ(β h_w) + σ(β h_l): raises y_w, lowers y_l; for chosen completions that are better than the policy's own.

    APO-zero, arXiv:2408.06266, Eq. 7.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


@shapes(chosen="P", rejected="P")
def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """σ(β h_w) + 1 − σ(β [h_w − h_l]): lowers both, y_l more; for chosen completions worse than the policy's.

    APO-down, arXiv:2408.06266, Eq. 8.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


@shapes(margin="P", ref_margin="P")
def aot(margin: Tensor, ref_margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β [m₍ᵢ₎ − m_ref₍ᵢ₎]) of margins m = log π(y_w) − log π(y_l), each sorted over the batch.

    Trains the *distribution* of the policy's margins to dominate that of the reference. Sorting couples the pairs of a
    batch, which should be large: loss i is that of the i-th smallest margins, not of pair i. AOT, arXiv:2406.05882.
    """
    return sigmoid(margin.sort().values, ref_margin.sort().values, beta=beta, label_smoothing=label_smoothing)


@shapes(chosen="P", rejected="P")
def aot_unpaired(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β [h_w₍ᵢ₎ − h_l₍ᵢ₎]), h_w and h_l each sorted over the batch: the unpaired form of `aot`, same paper."""
    return sigmoid(chosen.sort().values, rejected.sort().values, beta=beta, label_smoothing=label_smoothing)


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss: a formula and its inputs, `formula(*view(chosen, rejected), **options) -> [P]`.

    `view` names the inputs in `pairs.VIEWS`. The options are the formula's keyword-only arguments, named as `DPO`'s fields.
    The metrics `rewards/*` are β times `reward` of a side.
    """

    formula: Callable[..., Tensor]
    view: str
    reward: Callable[[Side], Tensor] = attrgetter("score")
    needs_reference: bool = True
    needs_full_batch: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        return _options(self.formula)

    def __call__(self, chosen: Side, rejected: Side, options: DPO) -> Tensor:
        return _bind(self.formula, options)(*pairs.VIEWS[self.view](chosen, rejected))


@cache
def _options(function: Callable) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def _bind(function: Callable[..., Tensor], options: Any) -> Callable[..., Tensor]:
    """Bind the keyword-only arguments of `function` to the attributes of `options` with the same names."""
    return partial(function, **{name: getattr(options, name) for name in _options(function)})


DPOLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
    "sft",
    "cpo",
    "simpo",
    "alphapo",
    "orpo",
]

LOSSES: dict[DPOLoss, Loss] = {
    "sigmoid": Loss(sigmoid, "scores"),
    "sigmoid_norm": Loss(sigmoid, "mean_scores"),
    "hinge": Loss(hinge, "scores"),
    "ipo": Loss(ipo, "mean_scores"),
    "exo_pair": Loss(exo_pair, "scores"),
    "robust": Loss(robust, "scores"),
    "discopop": Loss(discopop, "scores"),
    "nca_pair": Loss(nca_pair, "logratios"),
    "bco_pair": Loss(bco_pair, "logratios"),
    "sppo_hard": Loss(sppo_hard, "logratios"),
    "apo_zero": Loss(apo_zero, "logratios"),
    "apo_down": Loss(apo_down, "logratios"),
    "aot": Loss(aot, "margins", needs_full_batch=True),
    "aot_unpaired": Loss(aot_unpaired, "logratios", needs_full_batch=True),
    "sft": Loss(sft, "chosen_nll", needs_reference=False),
    "cpo": Loss(cpo, "logprobs_and_nll", attrgetter("logprob"), needs_reference=False),
    "simpo": Loss(simpo, "mean_logprobs", attrgetter("mean_logprob"), needs_reference=False),
    "alphapo": Loss(alphapo, "mean_logprobs", attrgetter("mean_logprob"), needs_reference=False),
    "orpo": Loss(orpo, "mean_logprobs_and_nll", attrgetter("mean_logprob"), needs_reference=False),
}
"""Losses by their names in `loss_types`. A batch cannot be split into micro-batches for one with `needs_full_batch`."""


@dataclass(kw_only=True)
class DPOOptions:
    """Hyperparameters of the losses; the trainer's configuration inherits them."""

    beta: float = 0.1
    """β: strength of the KL regularisation towards the reference policy. IPO's τ, ORPO's λ."""

    loss_weights: list[float] | None = None
    """Weight of each of several losses in the sum. None: 1 each."""

    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5), for the losses that model it."""

    reference_free: bool = False
    """Use a uniform distribution as the reference: h is then the log-probability."""

    rpo_alpha: float | None = None
    """Weight of −log π(y_w) / |y_w|, added to the loss (RPO, arXiv:2404.19733). None: not added."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference (f-DPO, arXiv:2309.16240)."""

    f_alpha_divergence_coef: float = 0.5
    """Coefficient of the α-divergence: 1 is reverse KL, 0 is forward KL."""

    ld_alpha: float | None = None
    """Weight in [0, 1] of tokens beyond the shorter completion's length (LD-DPO, arXiv:2409.06411). None: 1."""

    use_weighting: bool = False
    """Weight each pair by how likely the policy is to sample its completions (WPO, arXiv:2406.11827)."""

    discopop_tau: float = 0.05
    """τ: temperature of the mixture in DiscoPOP (arXiv:2406.08414), whose value is the default."""

    simpo_gamma: float = 0.5
    """γ: target margin between the β-scaled rewards of SimPO and AlphaPO (arXiv:2405.14734)."""

    cpo_alpha: float = 1.0
    """Weight of −log π(y_w) / |y_w| in "cpo" (arXiv:2401.08417)."""

    alphapo_alpha: float = 0.25
    """Shape of AlphaPO's reward: 0 is SimPO's logarithm (arXiv:2501.03884)."""


@dataclass(kw_only=True)
class DPO(DPOOptions):
    """The DPO family as an algorithm: a weighted sum of losses in `LOSSES`, with one reference.

    Reads `batch.signals["ref_logprobs"] [N,C]` if `needs_reference`, and the statistics of `Scores` that `wants` names.
    Raises ConfigError for options that are unknown, out of range, or used by none of the losses.
    """

    loss_types: str | Sequence[str] = ("sigmoid",)
    """One loss or several, by the names in `LOSSES`."""

    def __post_init__(self) -> None:
        self.loss_types = [self.loss_types] if isinstance(self.loss_types, str) else self.loss_types
        self.loss_weights = [1.0] * len(self.loss_types) if self.loss_weights is None else list(self.loss_weights)
        _check_names(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def terms(self) -> list[tuple[str, float]]:
        """Names and weights of the summed losses, including the RPO term."""
        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        return terms if self.rpo_alpha is None else [*terms, ("sft", self.rpo_alpha)]

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free and any(LOSSES[name].needs_reference for name in self.loss_types)

    @property
    def needs_full_batch(self) -> bool:
        """True if the loss of a pair depends on the other pairs of its batch."""
        return any(LOSSES[name].needs_full_batch for name in self.loss_types)

    @property
    def wants(self) -> frozenset[str]:
        """Statistics of `Scores` that the loss needs in addition to log-probabilities."""
        return frozenset({"collision"}) if self.use_weighting else frozenset()

    def loss(self, scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of every pair `[P]`, and metrics `[P]`; `logps/*` is log π(y) in nats."""
        chosen, rejected = self.sides(scores, batch)
        losses = [LOSSES[name](chosen, rejected, self) for name, _ in self.terms]
        total = sum(weight * loss for (_, weight), loss in zip(self.terms, losses, strict=True))
        if self.use_weighting:
            assert scores.collision is not None, "score the batch with the statistics that `wants` names"
            total = total * pairs.wpo_weights(scores.logprobs, scores.collision, batch.mask)
        reward = LOSSES[self.loss_types[0]].reward
        metrics = pairs.reward_metrics(self.beta * reward(chosen), self.beta * reward(rejected))
        metrics |= {"logps/chosen": chosen.logprob.detach(), "logps/rejected": rejected.logprob.detach()}
        if len(losses) > 1:
            metrics |= {f"loss/{name}": loss.detach() for (name, _), loss in zip(self.terms, losses, strict=True)}
        return total, metrics

    def sides(self, scores: Scores, batch: Batch) -> tuple[Side, Side]:
        """Log-probabilities, scores and lengths of the chosen and of the rejected completions, `[P]` each."""
        named = f"loss_types={self.loss_types}"
        reference = required(batch, "ref_logprobs", by=named) if self.needs_reference else None
        weight = None if self.ld_alpha is None else pairs.ld_dpo_weights(batch.mask, self.ld_alpha)
        divergence = _bind(F_DIVERGENCES[self.f_divergence_type], self)
        return pairs.sides(scores.logprobs, reference, batch.mask, weight=weight, divergence=divergence)


def _check_names(o: DPO) -> None:
    for name in o.loss_types:
        if name == "kto_pair":
            raise ConfigError(
                "loss_type 'kto_pair' is KTO on pairs: give the same rows to KTOTrainer, which takes pairs apart."
            )
        if name not in LOSSES:
            raise ConfigError(unknown("loss_type", name, LOSSES))
    check_choices(o)
    if not o.loss_types:
        raise ConfigError("loss_types is empty: name at least one loss, for example 'sigmoid'.")
    if len(o.loss_weights) != len(o.loss_types):
        raise ConfigError(
            f"loss_weights has {len(o.loss_weights)} entries for {len(o.loss_types)} loss_types {o.loss_types}: "
            "give one weight per loss, or none at all."
        )


def _check_ranges(o: DPO) -> None:
    if not o.beta > 0:
        raise ConfigError(f"beta must be positive, got {o.beta}.")
    check_bounds(o)
    if "exo_pair" in o.loss_types and o.label_smoothing == 0:
        raise ConfigError("loss_type 'exo_pair' needs label_smoothing > 0; its paper recommends 1e-3.")


def _check_combinations(o: DPO) -> None:
    losses = {name: LOSSES[name] for name in o.loss_types}
    if o.label_smoothing and not any("label_smoothing" in loss.options for loss in losses.values()):
        raise ConfigError(
            f"label_smoothing={o.label_smoothing} is used by none of loss_types={list(losses)}: leave it at 0, or use one "
            f"of {[name for name, loss in LOSSES.items() if 'label_smoothing' in loss.options]}."
        )
    coupled = [name for name, loss in losses.items() if loss.needs_full_batch]
    if o.use_weighting and coupled:
        raise ConfigError(f"use_weighting weighs single pairs, but {coupled} sort a batch. Switch it off.")
    if o.f_divergence_type != "reverse_kl":
        _check_divergence(o, losses)


def _check_divergence(o: DPO, losses: dict[str, Loss]) -> None:
    """Raise ConfigError for losses that do not depend on a difference of scores alone, which `f_dpo` requires."""
    of_scores = [name for name, loss in LOSSES.items() if loss.view in ("scores", "mean_scores")]
    wrong = [name for name, loss in losses.items() if name not in of_scores and loss.needs_reference]
    if wrong or o.reference_free or not set(losses) & set(of_scores):
        raise ConfigError(
            f"f_divergence_type={o.f_divergence_type!r} is defined for {of_scores} with a reference, not for "
            f"{wrong or list(losses)}{' with reference_free' if o.reference_free else ''}. Use 'reverse_kl' there."
        )
