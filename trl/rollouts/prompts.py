"""Prompts for rollout batches: an endless sequence of rows, of which each process takes its share.

The row at position p of the sequence depends on p alone, so that a resumed run continues where it stopped, and a rollout
batch may take more prompts than planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from trl.errors import DataError

Row = Mapping[str, Any]


class TableRows:
    """Rows of a dataset, epoch after epoch; if shuffled, each epoch has a different order."""

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
    """Rows of a streamed dataset, which starts again from the beginning when it ends. Positions must increase."""

    def __init__(self, rows: IterableDataset) -> None:
        self._rows = _repeated(rows)
        self._next = 0

    def __getitem__(self, position: int) -> Row:
        skipped, self._next = position - self._next, position + 1
        return next(islice(self._rows, skipped, None))


def _repeated(rows: IterableDataset) -> Iterator[Row]:
    """The rows of a stream, endlessly. Raises DataError for a stream without rows, of which none would ever come."""
    while True:
        row = None
        for row in rows:
            yield row
        if row is None:
            raise DataError("The stream of prompts is empty: it has no rows, or all of them were dropped.")


class Prompts:
    """The rows of this process. `cursor` is the number of rows that all processes together have taken.

    With `shuffle`, the rows of a dataset are reshuffled every epoch; a stream keeps its order. Rows are dealt out to the
    processes in turn, so that a part of a rollout batch has the same prompts for any number of processes.
    """

    def __init__(
        self, rows: Dataset | IterableDataset, *, seed: int = 0, shuffle: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.count = len(rows) if isinstance(rows, Dataset) else None
        self.rows = StreamRows(rows) if self.count is None else TableRows(rows, seed=seed, shuffle=shuffle)
        self.rank, self.world = rank, world
        self.cursor = 0

    def batches_per_epoch(self, count: int) -> int | None:
        """Number of complete batches in an epoch, at `count` rows per process; at least 1. None for a stream without end."""
        return None if self.count is None else max(1, self.count // (count * self.world))

    def take(self, count: int) -> list[Row]:
        """The next `count` rows of this process; every other process takes the same number."""
        return self.deal([count] * self.world)

    def deal(self, counts: Sequence[int]) -> list[Row]:
        """The next rows of this process, where the process of rank r takes `counts[r]` rows."""
        owners = [rank for turn in range(max(counts)) for rank, count in enumerate(counts) if turn < count]
        start, self.cursor = self.cursor, self.cursor + len(owners)
        return [self.rows[start + i] for i, owner in enumerate(owners) if owner == self.rank]
