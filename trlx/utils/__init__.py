"""Small utilities that scripts import."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator
from numbers import Number
from typing import Any

__all__ = ["Clock", "filter_non_scalars", "infinite_dataloader", "set_seed", "significant"]


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch with `seed` + rank."""
    import numpy as np
    import torch

    seed += int(os.environ.get("RANK", 0))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Clock:
    """Measures seconds between calls, and per thousand samples."""

    def __init__(self) -> None:
        self.start = time.time()
        self.total_time = 0.0
        self.total_samples = 0

    def tick(self, samples: int = 0) -> float:
        """Seconds since the last call, or since the start, in which `samples` were processed."""
        end = time.time()
        delta, self.start = end - self.start, end
        if samples:
            self.total_time += delta
            self.total_samples += samples
        return delta

    def get_stat(self, n_samp: int = 1000, reset: bool = False) -> float:
        """Mean seconds per `n_samp` samples so far."""
        stat = self.total_time * n_samp / max(self.total_samples, 1)
        if reset:
            self.total_time, self.total_samples = 0.0, 0
        return stat


def significant(x: Any, ndigits: int = 2) -> Any:
    """Round a number to `ndigits` significant digits; return other values unchanged."""
    if not isinstance(x, Number) or isinstance(x, bool) or x == 0 or x != x:
        return x
    return float(f"{x:.{ndigits}g}")


def filter_non_scalars(xs: dict[str, Any]) -> dict[str, float]:
    """The numbers of a dict, as floats."""
    return {name: float(x) for name, x in xs.items() if isinstance(x, Number)}


def infinite_dataloader(dataloader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the batches again and again."""
    while True:
        yield from dataloader
