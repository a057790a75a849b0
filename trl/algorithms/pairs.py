"""Inputs of pairwise losses: log-probabilities and scores of the chosen (even index) and rejected (odd index) completions.

    log π(y) = Σ_t w_t log π(y_t | x, y_<t),       h(y) = log π(y) − log π_ref(y),       score(y) = f'(π / π_ref)

w_t is 1 except with `ld_dpo_weights`. The score is h for the reverse KL divergence, the default; f' is explained in
`trl.algorithms.f_dpo`. P pairs are N = 2P completions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trl.errors import DataError
from trl.ops.shapes import shapes
from trl.types import Metrics


@dataclass(frozen=True, slots=True)
class Side:
    """The chosen or the rejected completions of P pairs, every field `[P]`.

    logprob      log π(y)
    ref_logprob  log π_ref(y); zero without a reference, as for a uniform distribution up to a constant
    score        f'(π / π_ref)
    length       number of scored tokens
    nll          −Σ_t log π(y_t) / length, always with w_t = 1
    """

    logprob: Tensor
    ref_logprob: Tensor
    score: Tensor
    length: Tensor
    nll: Tensor

    @property
    def logratio(self) -> Tensor:
        """h(y) = log π(y) − log π_ref(y), `[P]`."""
        return self.logprob - self.ref_logprob

    @property
    def mean_score(self) -> Tensor:
        """Score per token, `[P]`."""
        return self.score / self.length

    @property
    def mean_logprob(self) -> Tensor:
        """log π(y) per token, `[P]`."""
        return self.logprob / self.length


def split_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split `x [2P,…]` into the chosen (even) and the rejected (odd) rows, `[P,…]` each."""
    if len(x) % 2:
        raise DataError(
            f"A batch of pairs must have an even number of completions, got {len(x)}. "
            "Give every example two completions: the chosen one first, then the rejected one."
        )
    return x[0::2], x[1::2]


@shapes(logprobs="N C", ref_logprobs="N C", mask="N C", weight="N C")
def sides(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    *,
    weight: Tensor | None = None,
    divergence: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Side, Side]:
    """Sum `logprobs [N,C]` and `ref_logprobs [N,C]` over `mask [N,C]`, and split the results into chosen and rejected.

    `weight [N,C]` replaces the mask in those sums (`ld_dpo_weights`). `divergence` maps log-ratios to scores.
    """
    weight = mask if weight is None else weight
    length = mask.sum(-1).clamp(min=1)
    logprob = (logprobs * weight).sum(-1)
    ref_logprob = torch.zeros_like(logprob) if ref_logprobs is None else (ref_logprobs * weight).sum(-1)
    logratio = logprob - ref_logprob
    score = logratio if divergence is None else divergence(logratio)
    nll = -(logprobs * mask).sum(-1) / length
    columns = [split_pairs(x) for x in (logprob, ref_logprob, score, length, nll)]
    chosen, rejected = (Side(*column) for column in zip(*columns, strict=True))
    return chosen, rejected


@shapes(mask="N C")
def ld_dpo_weights(mask: Tensor, alpha: float) -> Tensor:
    """Weights w_t `[N,C]`: 1 up to the length l of the shorter completion of a pair, `alpha` on the tail of the longer one.

        log π(y) = Σ_{t ≤ l} log π(y_t) + α Σ_{t > l} log π(y_t),       l = min(|y_w|, |y_l|)

    Length then matters less in the comparison: α = 1 is plain DPO, α = 0 ignores the tail. Lengths count scored tokens.
    LD-DPO, arXiv:2409.06411.
    """
    chosen, rejected = split_pairs(mask.sum(-1))
    shared = torch.minimum(chosen, rejected).repeat_interleave(2)
    return torch.where(mask.cumsum(-1) <= shared[:, None], mask, mask * alpha)


@shapes(logprobs="N C", collision="N C", mask="N C")
@torch.no_grad()
def wpo_weights(logprobs: Tensor, collision: Tensor, mask: Tensor) -> Tensor:
    """Weight `[P]` of each pair, by how likely the policy is to sample its completions; without gradient.

        w(y) = exp( 1/|y| Σ_t [ log π(y_t) − log Σ_v π(v)² ] ),       weight = w(y_w) w(y_l)

    Σ_v π(v)² (`collision [N,C]`) is the expected probability of a token sampled from π: dividing by it gives completions
    that the policy sampled itself weights around 1, whatever their entropy.
    WPO, arXiv:2406.11827, Eq. 2 with sampled alignment.
    """
    aligned = (logprobs - collision.clamp(min=torch.finfo(collision.dtype).tiny).log()) * mask
    chosen, rejected = split_pairs((aligned.sum(-1) / mask.sum(-1).clamp(min=1)).exp())
    return chosen * rejected


@shapes(chosen="P", rejected="P")
def reward_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """Metrics `[P]` of the implicit rewards of the two sides; the accuracy is 1 where the chosen one is higher."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
    }


@shapes(chosen="N")
def by_preference(name: str, values: Tensor, chosen: Tensor) -> Metrics:
    """Split `values`, `[N]` or `[N,C]`, into `name/chosen` and `name/rejected`, with NaN for the other completions."""
    values = values.detach()
    is_chosen = chosen.bool().view(-1, *[1] * (values.dim() - 1))
    return {
        f"{name}/chosen": values.masked_fill(~is_chosen, torch.nan),
        f"{name}/rejected": values.masked_fill(is_chosen, torch.nan),
    }


VIEWS: dict[str, Callable[[Side, Side], tuple[Tensor, ...]]] = {
    "scores": lambda chosen, rejected: (chosen.score, rejected.score),
    "mean_scores": lambda chosen, rejected: (chosen.mean_score, rejected.mean_score),
    "logratios": lambda chosen, rejected: (chosen.logratio, rejected.logratio),
    "margins": lambda chosen, rejected: (chosen.logprob - rejected.logprob, chosen.ref_logprob - rejected.ref_logprob),
    "mean_logprobs": lambda chosen, rejected: (chosen.mean_logprob, rejected.mean_logprob),
    "mean_logprobs_and_nll": lambda chosen, rejected: (chosen.mean_logprob, rejected.mean_logprob, chosen.nll),
    "logprobs_and_nll": lambda chosen, rejected: (chosen.logprob, rejected.logprob, chosen.nll),
    "chosen_nll": lambda chosen, rejected: (chosen.nll,),
}
"""Inputs of the loss formulas, `[P]` each, by name: functions of the chosen and the rejected `Side`.

"margins" are log π(y_w) − log π(y_l), of the policy and of the reference.
"""
