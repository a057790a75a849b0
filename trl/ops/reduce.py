"""Masked averages, and the token weights that make a loss independent of how its batch was split.

    loss = Σ_n Σ_t weight[n,t] · loss[n,t],      Σ weight = 1 over the accumulation window and all processes

"token" and "sequence" averaging differ in the weights: see `WEIGHTS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trl.ops.shapes import shapes


@shapes(x="...", mask="...")
def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x [N,C]` where `mask [N,C]` is 1: a scalar, or `[N]` with `dim=-1`; 0 where the mask is empty."""
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)


@shapes(x="...", mask="...")
def masked_whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """`x [N,C]` with mean 0 (or its own, with `keep_mean`) and variance 1 over the mask, zero outside it.

    The variance has Bessel's correction, Σ (x − x̄)² / (m − 1).
    """
    mean = masked_mean(x, mask)
    centred = (x - mean) * mask
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened + mean * mask if keep_mean else whitened


@shapes(values="N", mask="N C")
def at_last(values: Tensor, mask: Tensor) -> Tensor:
    """`[N,C]` with `values [N]` at the last position of each row where `mask [N,C]` is 1, zero elsewhere."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1, keepdim=True)
    return torch.zeros_like(mask).scatter(1, last, values[:, None].to(mask.dtype)) * mask


def _token(mask: Tensor) -> Tensor:
    return mask


def _sequence(mask: Tensor) -> Tensor:
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"token": _token, "sequence": _sequence}
"""Unnormalised weights `[N,C]` from a mask `[N,C]`.

"token": the mean over all scored tokens of the window. "sequence": the mean over completions of the mean over their tokens.
"""
