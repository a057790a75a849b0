"""Norms and rotations of a decoding step in one kernel each, where an architecture's do what these do.

    norm       y = x / √(mean x² + ε) · (w + offset)            Zhang and Sennrich 2019, equation 4; offset 1 in Gemma
    rotation   x′ = x · cos + [−x₂, x₁] · sin,  x = [x₁, x₂]    Su et al. 2021, equation 34, halves side by side

With one token per row a kernel does next to nothing, so that a step takes as long as it has kernels; written with PyTorch's
operations a norm has eight and a rotation ten. An architecture's own code decides: its norm, and its function that rotates,
are run on random numbers next to the kernel, and are replaced while decoding if the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

ROTATION = "apply_rotary_pos_emb"
"""What models of `transformers` call the function that rotates queries and keys, each in its own file."""


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


@triton.jit
def _rotate_kernel(query, key, cos, sin, query_out, key_out, query_stride, key_stride, cos_stride,
                   QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """One head of a row per program: query heads first, then key heads."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    inside = lane < HALF
    if head < QUERY_HEADS:
        source = query + row * query_stride + head * 2 * HALF
        target = query_out + (row * QUERY_HEADS + head) * 2 * HALF
    else:
        source = key + row * key_stride + (head - QUERY_HEADS) * 2 * HALF
        target = key_out + (row * KEY_HEADS + head - QUERY_HEADS) * 2 * HALF
    first = tl.load(source + lane, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + lane, mask=inside, other=0.0).to(tl.float32)
    angle = row * cos_stride + lane
    one = first * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    one -= second * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    two = second * tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    two += first * tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + lane, one.to(query_out.dtype.element_ty), mask=inside)
    tl.store(target + HALF + lane, two.to(query_out.dtype.element_ty), mask=inside)


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


def rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys `[B,heads,1,D]`, by cos and sin `[B,1,D]`, in one kernel; in `dtype`, or the wider of both."""
    (rows, query_heads, _, size), key_heads = query.shape, key.shape[1]
    dtype = dtype or torch.promote_types(query.dtype, cos.dtype)
    out = tuple(
        torch.empty(rows, heads, 1, size, dtype=dtype, device=query.device) for heads in (query_heads, key_heads)
    )
    query, key, cos, sin = query[:, :, 0].flatten(1), key[:, :, 0].flatten(1), cos.contiguous(), sin.contiguous()
    _rotate_kernel[(rows, query_heads + key_heads)](
        query, key, cos, sin, *out, query.stride(0), key.stride(0), 0 if len(cos) == 1 else size,
        QUERY_HEADS=query_heads, KEY_HEADS=key_heads, HALF=size // 2, WIDTH=triton.next_power_of_2(size // 2),
    )  # fmt: skip
    return out


# ── finding what can be replaced ────────────────────────────────────────────────────────────────────────────────


def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of norm that `module` is, by its results on random numbers; None if it is another."""
    weight, epsilon = module._parameters.get("weight"), epsilon_of(module)
    if weight is None or weight.dim() != 1 or epsilon is None or "forward" in vars(module):
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    expected = module(x)
    for kind in NORM_KINDS:
        found = norm(x, weight=weight, epsilon=epsilon, kind=kind)
        if found.dtype == expected.dtype and close(found, expected):
            return kind
    return None


def epsilon_of(module: nn.Module) -> float | None:
    names = ("variance_epsilon", "eps", "epsilon")
    return next((vars(module)[name] for name in names if isinstance(vars(module).get(name), float)), None)


def close(found: Tensor, expected: Tensor, *, factors: torch.dtype | None = None) -> bool:
    """Whether results of one type are the same but for rounding, of products of `factors` or of that type."""
    rtol, atol = (1e-5, 1e-6) if (factors or expected.dtype) == torch.float32 else (2e-2, 1e-2)
    return torch.allclose(found.float(), expected.float(), rtol=rtol, atol=atol)


def rotates_halves(function: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> bool:
    """Whether an architecture's function rotates queries and keys as `rotate` does."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((3, 4, 1, 16), (3, 2, 1, 16), (3, 1, 16), (3, 1, 16))
    given = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    try:
        expected = function(*given)
    except (TypeError, ValueError, RuntimeError):  # it takes other arguments, so it is another function
        return False
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(rotate(*given), expected, strict=True))
