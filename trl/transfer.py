"""Copy all tensors of a batch to the device in one transfer.

A batch has a dozen small tensors. Each copy costs a launch on the host, and a copy from pageable memory blocks the host. So
the tensors are packed into one pinned buffer, which is copied once; on the device, views of it are the tensors.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 16
"""Alignment, in bytes, of each tensor in the buffer: the size of the largest element type."""


def sent(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Move the tensors to `device`; those on the CPU in one asynchronous copy."""
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if device.type == "cpu" or not on_host:
        return [tensor.to(device, non_blocking=True) for tensor in tensors]
    buffer, starts = packed(on_host, pinned=device.type == "cuda")
    arrived = iter(unpacked(buffer.to(device, non_blocking=True), starts, on_host))
    return [next(arrived) if t.device.type == "cpu" else t.to(device, non_blocking=True) for t in tensors]


def packed(tensors: list[Tensor], *, pinned: bool = False) -> tuple[Tensor, list[int]]:
    """Pack the tensors into one buffer of bytes; return it and the offset of each tensor."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    for place, tensor in zip(unpacked(buffer, starts, tensors), tensors, strict=True):
        place.copy_(tensor)
    return buffer, starts


def unpacked(buffer: Tensor, starts: list[int], like: list[Tensor]) -> list[Tensor]:
    """Views of the buffer at the offsets `starts`, with the shapes and dtypes of the tensors in `like`."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in like]
    parts = (buffer[start : start + size] for start, size in zip(starts, sizes, strict=False))
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
