"""Surrogate objectives: functions of ratios and advantages that a policy gradient maximises in place of the return.

    Clip     min(min(ρ, δ) A, clip(ρ, 1 − ε_low, 1 + ε_high) A)     PPO, arXiv:1707.06347, Eq. 7; two bounds as in DAPO,
                                                                   arXiv:2503.14476, Eq. 10; δ: arXiv:2505.07291, Eq. 1
    CISPO    sg[min(ρ, ε_max)] A log π                             arXiv:2506.13585, Eq. 4; arXiv:2510.13786
    SAPO     (4/τ) σ(τ (ρ − 1)) A,   τ by the sign of A            arXiv:2511.20347
    VESPO    sg[φ(W)] A log π,   φ(w) = w^k e^{λ (1 − w)}          arXiv:2602.10693; W the ratio of the whole completion
    GMPO     A (Π_t ρ̃_t)^{1/C}, log ρ̃ clipped as in PPO            arXiv:2507.20673

ρ = π/π_old, of a token or of a completion. sg: no gradient. At ρ = 1 each has the gradient of REINFORCE, A ∇log π.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trl.algorithms.policy_gradient import clipped_surrogate, ratio
from trl.ops.shapes import shapes
from trl.types import Metrics


@dataclass(frozen=True, slots=True)
class Terms:
    """Inputs of a surrogate.

    logprobs          [N,C] log π
    log_ratio_token   [N,C] log ρ of tokens
    log_ratio         [N,C] or [N,1] log ρ of tokens or completions, by the algorithm's `ratio_level`
    advantages        [N,C] or [N,1]
    mask              [N,C]
    """

    logprobs: Tensor
    log_ratio_token: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor


class Surrogate(Protocol):
    def __call__(self, terms: Terms) -> Tensor:
        """The objective to be maximised, `[N,C]` or `[N,1]`."""
        ...

    def metrics(self, terms: Terms) -> Metrics:
        """Metrics of how much is clipped or down-weighted; `[N,C]` or `[N]`."""
        ...


@dataclass(frozen=True, slots=True)
class Clip:
    """PPO's clipping: no gradient for a ratio above 1 + high with A > 0, or below 1 − low with A < 0.

    `delta` bounds the ratio in the case that this leaves unbounded: above 1 + high with A < 0.
    """

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None

    def __call__(self, terms: Terms) -> Tensor:
        bounds = {"low": self.low, "high": self.high, "delta": self.delta}
        return clipped_surrogate(terms.log_ratio, terms.advantages, **bounds)

    def metrics(self, terms: Terms) -> Metrics:
        return clip_metrics(terms.log_ratio, terms, below=1 - self.low, above=1 + self.high)


@dataclass(frozen=True, slots=True)
class CISPO:
    """REINFORCE weighted by the truncated ratio, without gradient through it: every token contributes a gradient."""

    high: float = 5.0

    def __call__(self, terms: Terms) -> Tensor:
        return ratio(terms.log_ratio).clamp(max=self.high).detach() * terms.advantages * terms.logprobs

    def metrics(self, terms: Terms) -> Metrics:
        rho = ratio(terms.log_ratio.detach())
        return {"cispo_clip_ratio": _per_completion(((rho > self.high) & (terms.advantages > 0)).float())}


@dataclass(frozen=True, slots=True)
class SAPO:
    """A sigmoid gate around ρ = 1 in place of hard clipping, with a higher temperature τ for negative advantages."""

    positive: float = 1.0
    negative: float = 1.05

    def __call__(self, terms: Terms) -> Tensor:
        tau = torch.where(terms.advantages > 0, self.positive, self.negative)
        return 4 / tau * torch.sigmoid(tau * (ratio(terms.log_ratio) - 1)) * terms.advantages

    def metrics(self, terms: Terms) -> Metrics:
        return {}


@dataclass(frozen=True, slots=True)
class VESPO:
    """REINFORCE weighted by φ(W), shaped like a gamma density, of the whole completion's ratio W; φ(1) = 1."""

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def __call__(self, terms: Terms) -> Tensor:
        return self.weight(terms) * terms.advantages * terms.logprobs

    @torch.no_grad()
    def weight(self, terms: Terms) -> Tensor:
        """φ(W) `[N,1]`, computed as exp(k log W + λ (1 − W)); k and λ depend on the sign of A."""
        log_w = (terms.log_ratio_token * terms.mask).sum(-1, keepdim=True).clamp(-20, 20)
        good = terms.advantages >= 0
        k = torch.where(good, self.k_positive, self.k_negative)
        rate = torch.where(good, self.lambda_positive, self.lambda_negative)
        return (k * log_w + rate * (1 - log_w.exp())).exp()

    def metrics(self, terms: Terms) -> Metrics:
        return {"vespo/phi_seq_mean": _per_completion(self.weight(terms))}


@dataclass(frozen=True, slots=True)
class GMPO:
    """Geometric mean of a completion's token ratios, each clipped to [e^−low, e^high] as PPO does."""

    low: float = 0.4
    high: float = 0.4

    def __call__(self, terms: Terms) -> Tensor:
        clipped = terms.log_ratio_token.clamp(-self.low, self.high)
        held = torch.where(
            terms.advantages > 0, terms.log_ratio_token.minimum(clipped), terms.log_ratio_token.maximum(clipped)
        )
        return ratio(mean_over_completion(held, terms.mask)) * terms.advantages

    def metrics(self, terms: Terms) -> Metrics:
        bounds = torch.tensor([-self.low, self.high]).exp().tolist()
        return clip_metrics(terms.log_ratio_token, terms, below=bounds[0], above=bounds[1])


@shapes(values="N C?", mask="N C")
def mean_over_completion(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the scored tokens of each completion, `[N,1]`."""
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


@shapes(log_ratio="N C?")
@torch.no_grad()
def clip_metrics(log_ratio: Tensor, terms: Terms, *, below: float, above: float) -> Metrics:
    """Fractions of ratios that are past a bound and so give no gradient: per token, and per completion as min or max."""
    rho = ratio(log_ratio)
    low = ((rho < below) & (terms.advantages < 0)).float()
    high = ((rho > above) & (terms.advantages > 0)).float()
    shares = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    whole = {"clip_ratio/low_min": low, "clip_ratio/high_max": high}
    per_completion = {name: mean_over_completion(share, terms.mask).squeeze(-1) for name, share in whole.items()}
    return {name: _per_completion(share) for name, share in shares.items()} | per_completion


def _per_completion(values: Tensor) -> Tensor:
    """Squeeze `[N,1]` to `[N]`; leave `[N,C]` unchanged."""
    return values.squeeze(-1) if values.shape[-1] == 1 else values
