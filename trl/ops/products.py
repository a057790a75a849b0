"""Matrix products with half-precision inputs and float32 output.

    c[i,j] = Σ_k a[i,k] · b[k,j],      a, b rounded to bfloat16 or float16,  every sum and c in float32

Tensor cores accumulate in float32 anyway; precision is lost only when the output is rounded. For logits with a standard
deviation of 3, rounding to bfloat16 changes log-probabilities by 3e-3 on average; without it they are within 1e-5 of
float64. CUDA has kernels for such products. On other devices the inputs are cast to float32 first, with the same results.
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
    """`x [I,J]` cast to float32; float64 is kept."""
    return x.to(wide_dtype(x.dtype))


def has_bfloat16() -> bool:
    """Whether the CUDA device computes in bfloat16, which cards before Ampere emulate slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def exact_products() -> Iterator[None]:
    """Disable TF32 on CUDA within the context: it keeps ten bits of each float32 input, too few to compare results."""
    settings = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x [I,J]` rounded to `dtype` and detached; except on CUDA, stored as float32 for `product`."""
    rounded = x.detach().to(dtype)
    return rounded if x.is_cuda else wide(rounded)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32 (float64 for float64 inputs), of matrices `[I,K]` and `[K,J]` of one dtype, into `out` if given."""
    dtype = wide_dtype(a.dtype)
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(wide(a), wide(b), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b for a float32 (or float64) `total [I,J]`, without rounding the product first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
