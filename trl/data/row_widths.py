"""Which sequences share a row of the grid: rows of a width that is given, or those that cost a model least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


def rows_of(sizes: Sequence[int], capacity: int | None, hidden_size: int | None, device: str) -> list[list[int]]:
    """Which examples share a row, by their `sizes` in tokens."""
    return fill_rows(sizes, max(*sizes, capacity)) if capacity else cheapest_rows(sizes, hidden_size, device)


def fill_rows(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bins: every item goes to the fullest row that still has room for it.

    Items are numbered as in `sizes`, all ≤ `capacity`. Quadratic in rows, meant for micro-batches.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [r for r in range(len(rows)) if room[r] >= sizes[item]]
        if fitting:
            row = min(fitting, key=room.__getitem__)
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


class AttentionCost(NamedTuple):
    """Time of a floating-point operation of attention in rows of one sequence each, and in rows with masks; 1 in matrices."""

    alone: float
    masked: float


COSTS = {"cpu": AttentionCost(1.0, 1.5), "cuda": AttentionCost(2.0, 4.0)}
"""By kind of device. A CPU's are measured. On CUDA, kernels that take masks reach about a quarter of the rate of products, and
those without about half of it; rows whose attention is of variable length need neither."""


def cheapest_rows(sizes: Sequence[int], hidden_size: int | None = None, device: str = "cpu") -> list[list[int]]:
    """Rows whose forward pass costs least: wide ones waste no positions, narrow ones no attention.

    A position costs 24 H² floating-point operations per layer in its matrices. In attention over a row of width T it
    costs 2 H T if a row is one sequence, since the kernel skips what comes later, and 4 H T if rows have to be masked;
    either takes longer there, by the factors a and m of `COSTS`: B rows cost ∝ B T (6 H + ½ a T) or B T (6 H + m T).
    Without H, rows are as wide as the longest.
    """
    longest, total = max(sizes), sum(sizes)
    if hidden_size is None:
        return fill_rows(sizes, longest)
    alone = [[i] for i in range(len(sizes))]
    most = len(fill_rows(sizes, longest))
    counts = {max(1, round(most * share)) for share in (1.0, 0.75, 0.5, 0.35, 0.25, 0.0)}
    alone_cost, masked_cost = COSTS.get(device, COSTS["cpu"])
    widths = {longest} | {max(longest, math.ceil(total / count * slack)) for count in counts for slack in (1.0, 1.05)}

    def cost(rows: list[list[int]]) -> float:
        width = max(sum(sizes[i] for i in row) for row in rows)
        attention = alone_cost / 2 if len(rows) == len(sizes) else masked_cost
        return len(rows) * width * (6 * hidden_size + attention * width)

    return min((alone, *(fill_rows(sizes, width) for width in sorted(widths))), key=cost)
