"""Common parts of policy-gradient methods: the probability ratio, the clipped surrogate, and KL estimators.

    ∇ E_{y∼π}[A] = E_{y∼π}[A ∇ log π(y)]
    ρ_t = π(y_t | x, y_<t) / π_old(y_t | x, y_<t)
    L_t = min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t)          (maximised)

PPO (Schulman et al. 2017, arXiv:1707.06347, Eq. 7), with two separate bounds as in DAPO (arXiv:2503.14476, Eq. 10).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trl.ops.shapes import shapes

MAX_EXPONENT = 80.0
"""Upper bound of exponents: beyond it `exp` nears the largest float32, and an infinite ratio gives NaN gradients."""


@shapes(logprobs="...", old_logprobs="...")
def log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """log ρ = log π − log π_old, `[N,C]`; no gradient through log π_old."""
    return logprobs - old_logprobs.detach()


def ratio(log_ratio: Tensor) -> Tensor:
    """ρ = exp(log ρ), `[N,C]` or any other shape, with log ρ capped at `MAX_EXPONENT` so that ρ stays finite."""
    return log_ratio.clamp(max=MAX_EXPONENT).exp()


@shapes(log_ratio="...?", advantages="...?")
def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, low: float, high: float, delta: float | None = None
) -> Tensor:
    """The objective min(min(ρ, δ) A, clip(ρ, 1 − low, 1 + high) A), to be maximised, `[N,C]`; arguments may be `[N,1]`.

    The gradient is 0 once ρ has passed 1 + high with A > 0, or 1 − low with A < 0. For A < 0 and a large ρ, only δ bounds the
    objective (arXiv:2505.07291, Eq. 1). None: no such bound.
    """
    rho = ratio(log_ratio)
    bounded = rho if delta is None else rho.clamp(max=delta)
    return torch.minimum(bounded * advantages, rho.clamp(1 - low, 1 + high) * advantages)


@shapes(log_ratio="...?", advantages="...?")
def is_clipped(log_ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """1 where ρ is past its bound, so that `clipped_surrogate` has gradient 0; else 0. `[N,C]` float, without gradient."""
    rho = ratio(log_ratio.detach())
    beyond = ((rho > 1 + high) & (advantages > 0)) | ((rho < 1 - low) & (advantages < 0))
    return beyond.to(rho.dtype)


@shapes(logprobs="...", ref_logprobs="...")
def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log π_ref, `[N,C]`: unbiased, with high variance, and often negative for a single token."""
    return logprobs - ref_logprobs


@shapes(logprobs="...", ref_logprobs="...")
def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ (log π − log π_ref)², `[N,C]`: biased, with low variance; its gradient is an unbiased estimate of that of the KL."""
    return (logprobs - ref_logprobs).square() / 2


@shapes(logprobs="...", ref_logprobs="...")
def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r − 1 − log r, `[N,C]`, with r = π_ref / π: unbiased and never negative."""
    log_r = ref_logprobs - logprobs
    return ratio(log_r) - 1 - log_r


KLEstimate = Literal["k1", "k2", "k3"]

KL: dict[KLEstimate, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimators of KL(π ‖ π_ref) from tokens that were sampled from π, `[N,C]` each.

Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
"""
