"""Capture a function as a CUDA graph, with what PyTorch leaves to the caller.

stream       belongs to one device: on the stream of another one, nothing would be captured
workspaces   cuBLAS keeps one per stream, from its first product on. One that was allocated during capture would keep the
             graph's memory from being freed as long as the process lives
failure      before PyTorch 2.13, a capture that CUDA has ended goes on for the allocator, whose next `empty_cache` then
             fails, and for the random number generator, which draws no more numbers outside of a graph; before 2.14 the
             graph's memory is not given back
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def capture(function: Callable[[], None], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture what `function` launches on the current device; return the graph and its memory pool.

    `pool` is that of earlier graphs, whose memory is shared, or None for a new one. Other threads may use the device meanwhile.
    """
    device, before, graph = torch.cuda.current_device(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    pool, has_begun = pool or torch.cuda.graph_pool_handle(), False
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
            has_begun = True
            function()
    except BaseException:
        torch.cuda.set_stream(before)
        if has_begun:
            _end(device, graph, pool)
        raise
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph, pool


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of all captures on a device: the allocator shares memory only within a stream."""
    return torch.cuda.Stream(device)


def _end(device: int, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a failed capture for the allocator and the random number generator, and give its memory back."""
    if torch.__version__ >= "2.14" or _has_ended(graph):
        return
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
        goes_on = True
    except RuntimeError:  # PyTorch 2.13: it has ended, for both
        goes_on = False
    torch._C._cuda_releasePool(device, pool)
    if goes_on:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_stream(device)):
            torch.zeros(1, device="cuda")  # the generator is done with captures once one has succeeded


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether the capture itself succeeded, and the error came from what was captured: the graph then gives its memory back."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True
