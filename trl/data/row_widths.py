"""Choose which sequences share a row of the grid, for a given row width or for the cheapest one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


def rows_of(sizes: Sequence[int], capacity: int | None, hidden_size: int | None, device: str) -> list[list[int]]:
    """The indices of the examples in each row, from their `sizes` in tokens."""
    return fill_rows(sizes, max(*sizes, capacity)) if capacity else cheapest_rows(sizes, hidden_size, device)


def fill_rows(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: from the largest on, each item goes to the fullest row that has room for it.

    Returns the indices into `sizes` (all ≤ `capacity`) for each row. Quadratic in the number of rows; for micro-batches.
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
    """Time of a floating-point operation of attention, relative to one in a matrix product: in rows of one sequence each, and
    in rows with attention masks."""

    alone: float
    masked: float


COSTS = {"cpu": AttentionCost(1.0, 1.5), "cuda": AttentionCost(2.0, 4.0)}
"""Costs by kind of device. Those of CPUs are measured. On CUDA, attention kernels with masks reach about a quarter of the FLOP
rate of matrix products, and those without about half of it; variable-length attention needs no masks."""


def cheapest_rows(sizes: Sequence[int], hidden_size: int | None = None, device: str = "cpu") -> list[list[int]]:
    """The rows with the cheapest forward pass: wide rows have less padding, narrow rows less attention.

    Per layer, a position costs 24 H² floating-point operations in matrix products. Attention over a row of width T adds
    2 H T if the row has one sequence, since causal kernels skip later keys, and 4 H T if rows need masks; each of these takes
    a or m times as long as one in a matrix product (`COSTS`). So B rows cost ∝ B T (6 H + ½ a T) or B T (6 H + m T).
    Without `hidden_size`, rows are as wide as the longest sequence.
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
