"""Metrics: summed on the device for as long as nobody looks, reduced over processes and read once when logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trl.types import Batch


class Meter:
    """Weighted means of named measurements.

    `add` takes what algorithms return (see `trl.types.Metrics`): `[N,C]` values are averaged over the mask, vectors
    over their entries that are not NaN. It neither synchronises nor communicates; `read` does both, once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], batch: Batch) -> None:
        for name, values in metrics.items():
            if values.dim() == 2:
                self.add_weighted(name, values, batch.mask)
            else:
                present = ~values.isnan()
                self.add_weighted(name, values.nan_to_num(), present)

    def add_weighted(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Count `values` into the mean of `name` with `weights` of the same shape."""
        weights = weights.double()
        pair = torch.stack([(values.detach().double() * weights).sum(), weights.sum()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def count(self, name: str, amount: float, *, per: float = 1.0) -> None:
        """Count host numbers into the ratio Σ amount / Σ per."""
        pair = torch.tensor([amount, per], dtype=torch.float64)
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Means over everything added since the last reading, on all processes; forgets what it has read.

        `reduce` sums a tensor over processes. Names without a single entry are left out.
        """
        if not self._sums:
            return {}
        table = reduce(torch.stack([pair.to(device) for pair in self._sums.values()])).cpu()
        names, self._sums = list(self._sums), {}
        return {name: (total / count).item() for name, (total, count) in zip(names, table, strict=True) if count > 0}
