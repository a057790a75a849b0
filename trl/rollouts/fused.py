"""Norms of a decoding step in one kernel each, where an architecture's do what this does.

    y = x / √(mean x² + ε) · (w + offset)            Zhang and Sennrich 2019, equation 4; offset 1 in Gemma

With one token per row a kernel does next to nothing, so that a step takes as long as it has kernels; written with PyTorch's
operations a norm has eight. An architecture's own code decides: its norm is run on random numbers next to the kernel, and is
replaced while decoding if the results are the same. Rotations are those of training: see `trl.models.fused`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from trl.models.fused import computes, epsilon_of, is_fused


@triton.jit
def _norm_kernel(x, weight, out, epsilon, size,
                 OFFSET: tl.constexpr, ROUNDS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One row `[size]` per program; with ROUNDS, rounded to the input's type before the weight is multiplied."""
    row = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, WIDTH)
    inside = lane < size
    raw = tl.load(x + row + lane, mask=inside, other=0.0)
    value = raw.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / size + epsilon)
    if ROUNDS:
        value = value.to(raw.dtype).to(tl.float32)
    scaled = value * (tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32) + OFFSET)
    tl.store(out + row + lane, scaled.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class NormKind:
    """Ways to write the norm: what is added to the weight, and whether the result has the type of x (else of x · w)."""

    offset: float
    keeps_type: bool


NORM_KINDS = (NormKind(0.0, False), NormKind(1.0, True))


def norm(x: Tensor, *, weight: Tensor, epsilon: float, kind: NormKind, dtype: torch.dtype | None = None) -> Tensor:
    """The norm of the last dimension of x, in one kernel; in `dtype`, or that which the architecture gives."""
    if dtype is None:
        dtype = x.dtype if kind.keeps_type else torch.promote_types(x.dtype, weight.dtype)
    x = x.contiguous()
    out, size = torch.empty_like(x, dtype=dtype), x.shape[-1]
    _norm_kernel[(x.numel() // size,)](
        x, weight, out, epsilon, size, OFFSET=kind.offset, ROUNDS=not kind.keeps_type, WIDTH=triton.next_power_of_2(size)
    )  # fmt: skip
    return out


# ── finding what can be replaced ────────────────────────────────────────────────────────────────────────────────


def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of norm that `module` is, by its results on random numbers; None if it is another."""
    return next((kind for kind in NORM_KINDS if computes(module, partial(norm_of, kind=kind), backward=False)), None)


def norm_of(module: nn.Module, x: Tensor, *, kind: NormKind, dtype: torch.dtype | None = None) -> Tensor:
    """`norm` with the module's weight and ε."""
    return norm(x, weight=module._parameters["weight"], epsilon=epsilon_of(module), kind=kind, dtype=dtype)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's forward is that of its class, or the one that training put there in its place."""
    return "forward" not in vars(module) or is_fused(module)
