"""Matrix products whose results are float32, whatever precision their factors have.

    c[i,j] = Σ_k a[i,k] · b[k,j],      a, b rounded to bfloat16 or float16,  every sum and c in float32

Tensor cores add in float32 anyway; what is lost is lost when the result is rounded. Of logits with a standard
deviation of 3, rounding to bfloat16 moves log-probabilities by 3e-3 on average; without it they are within 1e-5 of
float64. CUDA has products of this kind. Elsewhere factors are widened first, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """`x [I,J]` in float32; float64 stays."""
    return x.to(wide_dtype(x.dtype))


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 on CUDA without TF32, which keeps ten bits of each factor: for comparisons of small numbers."""
    settings = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x [I,J]` rounded to `dtype`, detached, in the type that `product` reads as it is on the device of `x`."""
    rounded = x.detach().to(dtype)
    return rounded if x.is_cuda else wide(rounded)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32 (float64 of float64), from matrices `[I,K]` and `[K,J]` of one type, into `out` if given."""
    dtype = wide_dtype(a.dtype)
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(wide(a), wide(b), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for a float32 (float64) `total [I,J]`, added before anything is rounded."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
