"""Launch Triton kernels on the device of their tensors; skip the launch for fake tensors, which have no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    import triton


def has_values(tensor: Tensor) -> bool:
    """False for a fake tensor, as the memory estimate uses: it has a shape and no data."""
    return not isinstance(tensor, FakeTensor)


def launch(
    kernel: triton.runtime.JITFunction, grid: tuple[int, ...], *arguments: Tensor | int | float, **flags: object
) -> None:
    """Launch a kernel whose first argument is a tensor. Do nothing if that is a fake tensor."""
    if has_values(arguments[0]):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **flags)
