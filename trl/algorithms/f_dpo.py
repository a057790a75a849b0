"""f-DPO: DPO with an f-divergence from the reference in place of the reverse KL divergence. arXiv:2309.16240.

    reward(y) = β f'(π(y) / π_ref(y)) + constant of the prompt

so f'(u) replaces DPO's log-ratio h = log u, where u = π / π_ref (Theorem 1, Table 1); a constant is added that makes it
zero at u = 1. The constant of the prompt cancels only in the difference between chosen and rejected, so that losses of
single completions have no such form.

Every function takes log-ratios log(π / π_ref) in nats, `[N]` of whole completions or of any other shape, and returns scores
of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from trl.algorithms.policy_gradient import MAX_EXPONENT


def power(logratio: Tensor, exponent: float) -> Tensor:
    """(u^p − 1) / p of u = exp(logratio), `[N]`; log u for p = 0, the limit. u^p is capped at e^80 to stay finite."""
    if exponent == 0:
        return logratio
    return (logratio * exponent).clamp(max=MAX_EXPONENT).expm1() / exponent


def reverse_kl(logratio: Tensor) -> Tensor:
    """f(u) = u log u, score log u, `[N]`: plain DPO."""
    return logratio


def forward_kl(logratio: Tensor) -> Tensor:
    """f(u) = −log u, score 1 − 1/u, `[N]`."""
    return power(logratio, -1.0)


def js_divergence(logratio: Tensor) -> Tensor:
    """f(u) = u log u − (u + 1) log((u + 1)/2), score log(2u / (1 + u)), `[N]`: never above log 2."""
    return math.log(2.0) + F.logsigmoid(logratio)


def alpha_divergence(logratio: Tensor, *, f_alpha_divergence_coef: float) -> Tensor:
    """Score (u^(c−1) − 1) / (c − 1), `[N]`: reverse KL at c = 1, forward KL at c = 0.

    The paper's α, score (1 − u^−α) / α, is 1 − c.
    """
    return power(logratio, f_alpha_divergence_coef - 1.0)


F_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
