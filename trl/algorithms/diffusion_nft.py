"""DiffusionNFT, negative-aware fine-tuning of diffusion models: reinforcement learning without likelihoods of samples.

    v⁺ = (1 − β) v_old + β v_θ           v⁻ = (1 + β) v_old − β v_θ
    L  = r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖²

DiffusionNFT, arXiv:2509.16117. The old policy samples a picture x₀, with any solver, and r ∈ [0, 1] is its optimality; v is
the usual training target at a noised x₀. v_θ is thus fitted to good pictures, and its reflection about v_old to bad ones.
Errors are measured in x₀ and divided by their own mean magnitude (no gradient), so that all noise levels weigh the same.
"""

from __future__ import annotations

from torch import Tensor

from trl.errors import ConfigError
from trl.ops.shapes import shapes

SMALLEST_ERROR = 1e-5


@shapes(advantages="N")
def optimality(advantages: Tensor, *, bound: float) -> Tensor:
    """Optimality r = ½ + clip(A, −c, c) / 2c, `[N]` in [0, 1], from advantages A `[N]`; `bound` is c."""
    if not bound > 0:
        raise ConfigError(f"advantage_clip={bound}: give a number above 0.")
    return 0.5 + advantages.clamp(-bound, bound) / (2 * bound)


@shapes(output="M ...", old_output="M ...", target="M ...", optimality="M", noise_level="M")
def diffusion_nft(
    output: Tensor, old_output: Tensor, target: Tensor, optimality: Tensor, noise_level: Tensor, *, beta: float
) -> Tensor:
    """Loss L `[M]` from v_θ, v_old and v `[M,…]`, optimality r `[M]`, and noise level σ `[M]`.

    An error d of v is an error σ d of x₀. `beta` in (0, 1] says how far v⁺ and v⁻ move from v_old.
    """
    moved, old = output.float() - old_output.float(), old_output.float() - target.float()
    positive = _error(old + beta * moved, noise_level)
    negative = _error(old - beta * moved, noise_level)
    return optimality * positive + (1 - optimality) * negative


def _error(difference: Tensor, noise_level: Tensor) -> Tensor:
    """mean (σ d)² / mean |σ d| over dimensions, `[M]`, of errors d `[M,…]` in v; no gradient through the denominator."""
    in_clean = difference.flatten(1) * noise_level[:, None]
    return in_clean.square().mean(1) / in_clean.detach().abs().mean(1).clamp(min=SMALLEST_ERROR)
