"""Prompts for rounds of rollouts: an endless sequence of rows, of which every process takes its share.

Row number p of the sequence is a function of p, so a run that is resumed goes on where it stopped, and a round may take
more prompts than planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset

Row = Mapping[str, Any]


class TableRows:
    """Rows of a dataset, epoch after epoch, in an order of its own each if shuffled."""

    def __init__(self, rows: Dataset, *, seed: int, shuffle: bool) -> None:
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        self._order = (-1, range(0))

    def __getitem__(self, position: int) -> Row:
        epoch, place = divmod(position, len(self.rows))
        if not self.shuffle:
            return self.rows[place]
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self.rows[self._order[1][place]]


class StreamRows:
    """Rows of a stream, from its beginning again when it ends. Positions have to rise."""

    def __init__(self, rows: IterableDataset) -> None:
        self.rows = rows
        self._iterator: Iterator[Row] = iter(rows)
        self._next = 0

    def __getitem__(self, position: int) -> Row:
        while True:
            row = next(self._iterator, None)
            if row is None:
                self._iterator = iter(self.rows)
                continue
            self._next += 1
            if self._next > position:
                return row


class Prompts:
    """`take(count)` rows for this process; `cursor` is the number of rows that all processes have taken."""

    def __init__(self, rows: TableRows | StreamRows, *, rank: int = 0, world: int = 1) -> None:
        self.rows, self.rank, self.world = rows, rank, world
        self.cursor = 0

    def take(self, count: int) -> list[Row]:
        start = self.cursor + self.rank * count
        self.cursor += self.world * count
        return [self.rows[position] for position in range(start, start + count)]
