"""RMSNorm in one Triton kernel, for decode steps.

    y = x / √(mean x² + ε) · (w + offset)            Zhang and Sennrich 2019, equation 4; offset 1 in Gemma

With one token per row each kernel has little work, so that the time of a step grows with the number of kernels; a norm in
PyTorch operations launches eight. A norm module is replaced while decoding only if it gives the same results as this kernel
on random numbers. Rotary embeddings use the kernel of training: see `trl.models.fused`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from trl.models.fused import computes, epsilon_of, is_fused
from trl.ops.launch import launch


@triton.jit
def _norm_kernel(x, weight, out, epsilon, size,
                 OFFSET: tl.constexpr, ROUNDS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One row `[size]` per program; with ROUNDS, x is rounded to its dtype before it is multiplied by the weight."""
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
    """A variant of RMSNorm: `offset` is added to the weight; the output has the dtype of x if `keeps_type`, else of x · w."""

    offset: float
    keeps_type: bool


NORM_KINDS = (NormKind(0.0, False), NormKind(1.0, True))


def norm(x: Tensor, *, weight: Tensor, epsilon: float, kind: NormKind, dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm over the last dimension of x, in one kernel; the output has `dtype`, by default the one that `kind` says."""
    if dtype is None:
        dtype = x.dtype if kind.keeps_type else torch.promote_types(x.dtype, weight.dtype)
    x = x.contiguous()
    out, size = torch.empty_like(x, dtype=dtype), x.shape[-1]
    launch(
        _norm_kernel, (x.numel() // size,), x, weight, out, epsilon, size,
        OFFSET=kind.offset, ROUNDS=not kind.keeps_type, WIDTH=triton.next_power_of_2(size),
    )  # fmt: skip
    return out


# ── finding what can be replaced ────────────────────────────────────────────────────────────────────────────────


def norm_kind(module: nn.Module) -> NormKind | None:
    """The variant of RMSNorm that `module` computes, found by its results on random numbers; None if it is another norm."""
    return next((kind for kind in NORM_KINDS if computes(module, partial(norm_of, kind=kind), backward=False)), None)


def norm_of(module: nn.Module, x: Tensor, *, kind: NormKind, dtype: torch.dtype | None = None) -> Tensor:
    """`norm` with the module's weight and ε."""
    return norm(x, weight=module._parameters["weight"], epsilon=epsilon_of(module), kind=kind, dtype=dtype)


def has_own_forward(module: nn.Module) -> bool:
    """True if the module's forward is that of its class, or the fused one that training put in its place."""
    return "forward" not in vars(module) or is_fused(module)
