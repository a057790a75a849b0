"""Restore the state of PyTorch's random number generators."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def preserved_rng(device: torch.device) -> AbstractContextManager[None]:
    """A context after which the generators of the CPU and of `device` have their former state.

    The default of `fork_rng` is all visible CUDA devices, on each of which it would start a context, with a warning.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
