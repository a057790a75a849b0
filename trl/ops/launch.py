"""Starting a kernel of Triton: on the device of its tensors, and not at all where these have shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    import triton


def has_values(tensor: Tensor) -> bool:
    """False for a tensor of the estimate of memory, which has a shape alone."""
    return not isinstance(tensor, FakeTensor)


def launch(
    kernel: triton.runtime.JITFunction, grid: tuple[int, ...], *arguments: Tensor | int | float, **flags: object
) -> None:
    """Run a kernel, whose first argument is a tensor; nothing where that has no values."""
    if has_values(arguments[0]):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **flags)
