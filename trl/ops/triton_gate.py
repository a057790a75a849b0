"""The activation and product of a gated MLP as one kernel, forward and backward.

    p = act(g) ⊙ u          act(x) = x σ(z):  z = x (SiLU),  or z = 2 √(2/π) (x + 0.044715 x³) (GELU by tanh)
    act′(x) = σ(z) + x σ(z) (1 − σ(z)) z′

With PyTorch's operations this takes two kernels forward and three backward, and two more if act(g) and p are
recomputed. The kernel rounds to the input's dtype where PyTorch does: act(g), p, and the gradient of act(g). All else
is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from trl.ops.launch import launch

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "tanh": lambda x: F.gelu(x, approximate="tanh")}
"""Value of the kernels' constant `ACTIVATION` → the function in PyTorch."""

BLOCK = 1024
"""Elements per program."""


@triton.jit
def _sigma(x, ACTIVATION: tl.constexpr):
    """σ(z) and z′."""
    if ACTIVATION == "tanh":  # σ(2y) = (1 + tanh y) / 2
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        z, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return tl.sigmoid(z), slope


@triton.jit
def _gate_kernel(gate, up, out, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Compute `BLOCK` elements of p."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    sigma, _ = _sigma(x, ACTIVATION)
    active = (x * sigma).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, active * tl.load(up + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def _gate_backward_kernel(gate, up, grad, gate_out, up_out, product_out, count,
                          ACTIVATION: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Compute `BLOCK` elements of the gradients of g and u, and with `PRODUCT` of p."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    sigma, inner = _sigma(x, ACTIVATION)
    active = (x * sigma).to(up_out.dtype.element_ty).to(tl.float32)
    d_active = (d * y).to(gate_out.dtype.element_ty).to(tl.float32)
    tl.store(gate_out + at, d_active * (sigma + x * sigma * (1 - sigma) * inner), mask=inside)
    tl.store(up_out + at, d * active, mask=inside)
    if PRODUCT:
        tl.store(product_out + at, active * y, mask=inside)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(g) ⊙ u `[…,F]`, of g and u `[…,F]`."""
    gate, up = gate.contiguous(), up.contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    launch(_gate_kernel, (triton.cdiv(count, BLOCK),), gate, up, out, count, ACTIVATION=activation, BLOCK=BLOCK)
    return out


def gated_backward(
    gate: Tensor, up: Tensor, grad: Tensor, activation: str, *, product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients `[…,F]` of g and u, given that of p; with `product`, also the recomputed p `[…,F]`, else None."""
    gate, up, grad = (x.contiguous() for x in (gate, up, grad))
    of_gate, of_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    made = torch.empty_like(gate) if product else None
    launch(
        _gate_backward_kernel, (triton.cdiv(count, BLOCK),),
        gate, up, grad, of_gate, of_up, of_up if made is None else made, count,
        ACTIVATION=activation, PRODUCT=product, BLOCK=BLOCK,
    )  # fmt: skip
    return of_gate, of_up, made


def name_of(function: object) -> str | None:
    """The key in `ACTIVATIONS` of a function, found by its results on 65 numbers; None if the kernels do not have it."""
    if not callable(function):
        return None
    x = torch.linspace(-4, 4, 65)
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(function(x), known(x), atol=1e-6)), None)
