"""Gaussian log-probability, KL and entropy of latents, averaged over their dimensions.

    log N(x; μ, σ²)          = −(x − μ)² / 2σ² − log σ − ½ log 2π
    KL(N(μ, σ²) ‖ N(μ', σ²)) = (μ − μ')² / 2σ²
    H(N(μ, σ²))              = log σ + ½ log 2πe

A denoising step samples x' ~ N(μ, σ² I). Like DDPO (arXiv:2305.13301) and Flow-GRPO (arXiv:2505.05470), all three are means over
the D dimensions of the latent, not sums: clip ranges and KL coefficients are tuned for that.
"""

from __future__ import annotations

import math

from torch import Tensor

from trl.ops.shapes import shapes

HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


@shapes(sample="M ...", mean="M ...", sd="M")
def gaussian_logprob(sample: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Mean over dimensions of log N(sample; mean, sd²), `[M]` float32, of `sample` and `mean` `[M,…]` and `sd` `[M]` > 0."""
    z = (sample.float() - mean.float()) / _as_column(sd.float(), mean)
    return -0.5 * z.square().flatten(1).mean(1) - sd.float().log() - HALF_LOG_2_PI


@shapes(mean="M ...", other_mean="M ...", sd="M")
def gaussian_kl(mean: Tensor, other_mean: Tensor, sd: Tensor) -> Tensor:
    """Mean over dimensions of KL(N(mean, sd²) ‖ N(other_mean, sd²)), `[M]` float32; exact, not an estimate."""
    z = (mean.float() - other_mean.float()) / _as_column(sd.float(), mean)
    return 0.5 * z.square().flatten(1).mean(1)


@shapes(sd="M")
def gaussian_entropy(sd: Tensor) -> Tensor:
    """Entropy per dimension of N(·, sd²), in nats, `[M]` from `sd [M]` > 0."""
    return sd.float().log() + HALF_LOG_2_PI + 0.5


def _as_column(sd: Tensor, latents: Tensor) -> Tensor:
    """View `sd [M]` as `[M,1,…]`, so that it broadcasts over `latents [M,…]`."""
    return sd.view(-1, *[1] * (latents.dim() - 1))
