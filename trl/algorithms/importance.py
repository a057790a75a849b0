"""Importance weights for rollouts whose sampler differs from the policy: other kernels, other precision, older weights.

    w = π_old / π_sampler        of a token, or of a whole completion (the product over its tokens)

truncate   clip(w, low, high): biased, bounded variance
mask       w where low ≤ w ≤ high, else 0: outliers give no gradient

E_{π_sampler}[w ∇L] = E_{π_old}[∇L]: weighted by w, gradients of the sampler's samples have the expectation under π_old.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trl.algorithms.policy_gradient import k3, ratio
from trl.errors import ConfigError, unknown
from trl.ops.shapes import shapes
from trl.types import Metrics

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
MODES = get_args(CorrectionMode)


@dataclass(frozen=True, slots=True)
class Correction:
    """Function that computes importance weights w, truncated or masked at the bounds `low` and `high` (None: no bound)."""

    mode: CorrectionMode = "sequence_mask"
    low: float | None = None
    high: float | None = 3.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(unknown("importance_sampling_mode", self.mode, MODES))
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ConfigError(
                f"Importance weights have bounds low={self.low} and high={self.high}: low must be below high."
            )

    @torch.no_grad()
    def __call__(self, old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
        """w `[N,C]`, or `[N,1]` for whole completions, without gradient."""
        w, (low, high) = self.ratio(old_logprobs, sampler_logprobs, mask), self.bounds
        return w.clamp(low, high) if self.mode.endswith("truncate") else w * ((w >= low) & (w <= high))

    @torch.no_grad()
    def is_beyond(self, old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
        """1 for every token whose weight is outside the bounds, else 0, `[N,C]`."""
        w, (low, high) = self.ratio(old_logprobs, sampler_logprobs, mask), self.bounds
        return ((w < low) | (w > high)).to(mask.dtype).expand_as(mask)

    def ratio(self, old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
        """w before truncation or masking, `[N,C]`, or `[N,1]` for whole completions."""
        log_w = (old_logprobs - sampler_logprobs) * mask
        return ratio(log_w.sum(-1, keepdim=True) if self.mode.startswith("sequence") else log_w)

    @property
    def bounds(self) -> tuple[float, float]:
        return -torch.inf if self.low is None else self.low, torch.inf if self.high is None else self.high


@shapes(logprobs="N C", sampler_logprobs="N C", mask="N C")
@torch.no_grad()
def mismatch(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, correction: Correction) -> Metrics:
    """Metrics of the mismatch between sampler and policy: per token `[N,C]`, the extremes per completion `[N]`.

    `sampling/masked_share` is the share of tokens whose weight is outside the bounds of `correction`.
    """
    log_w = (logprobs - sampler_logprobs) * mask
    w = ratio(log_w)
    absent = mask == 0
    return {
        "sampling/sampling_logp_difference/mean": log_w.abs(),
        "sampling/sampling_logp_difference/max": log_w.abs().amax(-1),
        "sampling/importance_sampling_ratio/mean": w,
        "sampling/importance_sampling_ratio/min": w.masked_fill(absent, torch.inf).amin(-1),
        "sampling/importance_sampling_ratio/max": w.masked_fill(absent, 0).amax(-1),
        "sampling/kl": k3(sampler_logprobs, logprobs) * mask,
        "sampling/masked_share": correction.is_beyond(logprobs, sampler_logprobs, mask),
    }
