"""Metrics, summed on the device; reduced over processes and copied to the host once per log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from trl.errors import ConfigError
from trl.types import Batch

EXTREMES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "min_reward": torch.amin,
    "max_reward": torch.amax,
    "completions/min_length": torch.amin,
    "completions/max_length": torch.amax,
    "completions/min_terminated_length": torch.amin,
    "completions/max_terminated_length": torch.amax,
    "clip_ratio/low_min": torch.amin,
    "clip_ratio/high_max": torch.amax,
    "sampling/importance_sampling_ratio/min": torch.amin,
    "sampling/importance_sampling_ratio/max": torch.amax,
    "sampling/sampling_logp_difference/max": torch.amax,
}
"""Metrics that report the smallest or largest value in place of the mean."""


NOTHING = {torch.amin: torch.tensor(torch.inf).double(), torch.amax: torch.tensor(-torch.inf).double()}
"""Minimum and maximum of no values."""

Mark = tuple[dict[str, Tensor], dict[str, Tensor]]
"""A snapshot of a meter's sums and extremes."""


class LossMetrics(dict[str, Tensor]):
    """Metrics of one batch that `compute_loss` returns in place of the model's outputs, which are not kept.

    Raises ConfigError (an AttributeError for attributes) in code that reads such outputs.
    """

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(self._not_kept(name))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self._not_kept(name))

    def _not_kept(self, name: str) -> str:
        return (
            f"compute_loss returns the loss and the metrics {sorted(self)}, not the model's outputs: {name!r} is not among "
            "them. For a loss of your own override `loss(model, batch) -> (loss, metrics)`."
        )


class Meter:
    """Weighted means of named measurements.

    `add` takes what algorithms return (see `trl.types.Metrics`): `[N,C]` values are averaged over the batch's mask, vectors
    over their entries, NaN left out of both; of names in `EXTREMES` the smallest or largest of those is kept. It neither
    synchronises nor communicates; `read` does both, once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._extremes: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor], batch: Batch | None = None) -> None:
        for name, values in metrics.items():
            if name in EXTREMES:
                self._keep(name, values.detach().double())
            else:
                present = ~values.isnan()
                self.add_weighted(name, values.nan_to_num(), present * batch.mask if values.dim() == 2 else present)

    def add_weighted(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Add `values` to the mean of `name`, with `weights` of the same shape."""
        weights = weights.double()
        pair = torch.stack([(values.detach().double() * weights).sum(), weights.sum()])
        self._sum(name, pair)

    def _keep(self, name: str, values: Tensor) -> None:
        extreme = EXTREMES[name]
        values = values.nan_to_num(nan=torch.inf if extreme is torch.amin else -torch.inf)
        kept = [self._extremes[name].to(values.device)] if name in self._extremes else []
        self._extremes[name] = extreme(torch.stack([extreme(values.flatten(), 0), *kept]), 0)

    def count(self, name: str, amount: float | Tensor, *, per: float | Tensor = 1.0) -> None:
        """Add to the metric `name`, which is the ratio Σ amount / Σ per: two numbers, or two scalar tensors of one device."""
        self._sum(name, torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in (amount, per)]))

    def _sum(self, name: str, pair: Tensor) -> None:
        self._sums[name] = self._sums[name].to(pair.device) + pair if name in self._sums else pair

    def read(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Means and extremes of everything added on all processes since the last call, and reset the meter.

        `gather` stacks a tensor `[1,…]` of every process. Metrics without any value are left out.
        """
        self._agree_on_names()
        if not self._sums and not self._extremes:
            return {}
        pairs = [pair.to(device) for pair in self._sums.values()]
        row = torch.cat([*pairs, *(value.to(device)[None] for value in self._extremes.values())])
        table = gather(row[None]).cpu()
        sums = table[:, : 2 * len(pairs)].sum(0).view(-1, 2)
        found = {name: (x / n).item() for name, (x, n) in zip(self._sums, sums, strict=True) if n > 0}
        for name, column in zip(self._extremes, table[:, 2 * len(pairs) :].T, strict=True):
            if math.isfinite(value := EXTREMES[name](column, 0).item()):
                found[name] = value
        self._sums, self._extremes = {}, {}
        return found

    def _agree_on_names(self) -> None:
        """Add the names that other processes have, in one order: reward functions may log some on one process only."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        held: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(held, (list(self._sums), list(self._extremes)))
        sums, extremes = (dict.fromkeys(chain.from_iterable(names)) for names in zip(*held, strict=True))
        self._sums = {name: self._sums.get(name, torch.zeros(2, dtype=torch.float64)) for name in sums}
        self._extremes = {name: self._extremes.get(name, NOTHING[EXTREMES[name]]) for name in extremes}

    def mark(self) -> Mark:
        """A snapshot for `go_back`. It needs no copies, since additions create new tensors."""
        return dict(self._sums), dict(self._extremes)

    def go_back(self, mark: Mark) -> None:
        """Restore a snapshot: discard what was added since."""
        self._sums, self._extremes = mark

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "extremes": self._extremes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._extremes = dict(state["sums"]), dict(state["extremes"])
