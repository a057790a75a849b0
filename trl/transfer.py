"""The tensors of a batch on their way to the device, as one.

A batch has a dozen small tensors. Each copy costs the host a launch, and one from memory that is not pinned waits for the
device. So they are laid into one pinned buffer, which is copied once and read there as what it holds.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes at multiples of which tensors begin: the size of the largest element."""


def sent(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on `device`: those of the host by one copy that it does not wait for."""
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if device.type == "cpu" or not on_host:
        return [tensor.to(device, non_blocking=True) for tensor in tensors]
    buffer, starts = packed(on_host, pinned=device.type == "cuda")
    arrived = iter(unpacked(buffer.to(device, non_blocking=True), starts, on_host))
    return [next(arrived) if t.device.type == "cpu" else t.to(device, non_blocking=True) for t in tensors]


def packed(tensors: list[Tensor], *, pinned: bool = False) -> tuple[Tensor, list[int]]:
    """A buffer of bytes with all of the tensors, and where each begins."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    for place, tensor in zip(unpacked(buffer, starts, tensors), tensors, strict=True):
        place.copy_(tensor)
    return buffer, starts


def unpacked(buffer: Tensor, starts: list[int], like: list[Tensor]) -> list[Tensor]:
    """Views of the buffer that begin at `starts`, with the shapes and types of the tensors in `like`."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in like]
    parts = (buffer[start : start + size] for start, size in zip(starts, sizes, strict=False))
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
