"""Prompts for rollout batches: an endless sequence of rows, of which every process takes its share.

Row number p of the sequence is a function of p, so a run that is resumed goes on where it stopped, and a rollout batch may take
more prompts than planned.
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
    """Rows for this process; `cursor` is the number of rows that all processes have taken.

    Rows of a dataset are shuffled anew each epoch, where that is asked for; those of a stream come as they are. They are dealt
    out in turn, one to each process, so that a part of a rollout batch holds the same prompts whatever the number of processes.
    """

    def __init__(
        self, rows: Dataset | IterableDataset, *, seed: int = 0, shuffle: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.count = len(rows) if isinstance(rows, Dataset) else None
        self.rows = StreamRows(rows) if self.count is None else TableRows(rows, seed=seed, shuffle=shuffle)
        self.rank, self.world = rank, world
        self.cursor = 0

    def batches_per_epoch(self, count: int) -> int | None:
        """Whole batches of `count` rows for each process in an epoch, at least one; None for a stream, which has no end."""
        return None if self.count is None else max(1, self.count // (count * self.world))

    def take(self, count: int) -> list[Row]:
        """`count` rows; the other processes take as many."""
        return self.deal([count] * self.world)

    def deal(self, counts: Sequence[int]) -> list[Row]:
        """`counts[rank]` rows, where each process takes as many as `counts` says of it."""
        owners = [rank for turn in range(max(counts)) for rank, count in enumerate(counts) if turn < count]
        start, self.cursor = self.cursor, self.cursor + len(owners)
        return [self.rows[start + i] for i, owner in enumerate(owners) if owner == self.rank]
