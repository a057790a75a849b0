"""Negative-aware fine-tuning of diffusion models: reinforcement learning on the forward process, without likelihoods.

    v⁺ = (1 − β) v_old + β v_θ           v⁻ = (1 + β) v_old − β v_θ
    L  = r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖²

DiffusionNFT, arXiv:2509.16117. v is the target of ordinary training at a noisy version of a picture x₀ that the old policy
made, r ∈ [0, 1] how good x₀ was. v_θ is thus trained to be what makes good pictures, and its mirror image about v_old what
makes bad ones. Any solver may have made x₀. Errors are measured in x₀ and divided by their own size (no gradient), so that
all noise levels count alike.
"""

from __future__ import annotations

from torch import Tensor

from trl.errors import ConfigError
from trl.ops.shapes import shapes

SMALLEST_ERROR = 1e-5


def optimality(advantages: Tensor, *, bound: float) -> Tensor:
    """r = ½ + clip(A, −c, c) / 2c in [0, 1], of advantages `[N]` and their bound c."""
    if not bound > 0:
        raise ConfigError(f"advantage_clip={bound}: give a number above 0.")
    return 0.5 + advantages.clamp(-bound, bound) / (2 * bound)


@shapes(output="M ...", old_output="M ...", target="M ...", optimality="M", noise_level="M")
def diffusion_nft(
    output: Tensor, old_output: Tensor, target: Tensor, optimality: Tensor, noise_level: Tensor, *, beta: float
) -> Tensor:
    """L `[M]` of outputs and targets `[M,…]`, r `[M]`, and σ `[M]`, the share of noise: an error of v is σ times less in x₀.

    `beta` in (0, 1] is how far v⁺ and v⁻ are from v_old.
    """
    moved, old = output.float() - old_output.float(), old_output.float() - target.float()
    positive = _error(old + beta * moved, noise_level)
    negative = _error(old - beta * moved, noise_level)
    return optimality * positive + (1 - optimality) * negative


def _error(difference: Tensor, noise_level: Tensor) -> Tensor:
    """‖σ d‖² / mean |σ d|, a mean over dimensions, of differences `[M,…]`."""
    in_clean = difference.flatten(1) * noise_level[:, None]
    return in_clean.square().mean(1) / in_clean.detach().abs().mean(1).clamp(min=SMALLEST_ERROR)
