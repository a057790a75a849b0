"""Which rows of an evaluation batch count, where several processes share a set of rows.

Every process runs as many batches, so the last ones are filled up with rows that were there before: by accelerate where
the set is a table, whose length it knows, and here where it is a stream. Such rows are run, and not counted. A packed row
holds several items, so a batch keeps its items row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from torch.utils.data import IterableDataset


class Repeated(dict):
    """A row that was there before."""


class Filled(IterableDataset):
    """A stream of rows, and its first row again until their number is a multiple of `size`."""

    def __init__(self, rows: datasets.IterableDataset, size: int) -> None:
        self.rows, self.size = rows, size

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        count, first = 0, {}
        for row in self.rows:
            count, first = count + 1, first or row
            yield row
        yield from [Repeated(first)] * (-count % self.size)


@dataclass(frozen=True)
class RowItems:
    """The items of a batch, row by row; the first `counted` rows are there for the first time."""

    rows: list[list[Any]]
    counted: int


@dataclass(frozen=True)
class ByRow:
    """A collator of lists whose batches say which items belong to which row; other batches stay as they are."""

    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, rows: Sequence[Any]) -> Any:
        items = self.collate(rows)
        if not isinstance(items, list):
            return items
        is_packed = len(items) != len(rows)
        parts = [self.collate([row]) for row in rows] if is_packed else [[item] for item in items]
        return RowItems(parts, counted=sum(not isinstance(row, Repeated) for row in rows))
