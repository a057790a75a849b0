"""Which rows of an evaluation batch count, when several processes share a dataset.

All processes run the same number of batches, so the last batches are filled up with repeated rows: by accelerate for a dataset
of known length, and here for a streamed one. Repeated rows run through the model but do not count. A packed row consists of
several items, so a batch keeps its items by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from torch.utils.data import IterableDataset

from trl.types import RefusesKeys


class Repeated(dict):
    """A row that repeats an earlier one to fill up a batch."""


class Filled(IterableDataset):
    """A streamed dataset, followed by repetitions of its first row until the number of rows is a multiple of `size`."""

    def __init__(self, rows: datasets.IterableDataset, size: int) -> None:
        self.rows, self.size = rows, size

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        count, first = 0, {}
        for row in self.rows:
            count, first = count + 1, first or row
            yield row
        yield from [Repeated(first)] * (-count % self.size)


@dataclass(frozen=True)
class RowItems(RefusesKeys):
    """The items of a batch by row. Only the first `counted` rows count; the others are repetitions."""

    no_dict: ClassVar[str] = (
        "A batch of an evaluation is a `RowItems`, not a dict of input_ids and labels: its `rows` are lists of examples, with "
        "token ids in `prompt` and `completions[0].ids`. For metrics of your own return them from `loss(model, batch)`."
    )
    __contains__ = __getitem__ = __iter__ = pop = RefusesKeys.refuse_keys

    rows: list[list[Any]]
    counted: int


@dataclass(frozen=True)
class ByRow:
    """A collator that groups items by row if `collate` returns a list of items; other batches are returned unchanged."""

    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, rows: Sequence[Any]) -> Any:
        items = self.collate(rows)
        if not isinstance(items, list):
            return items
        is_packed = len(items) != len(rows)
        parts = [self.collate([row]) for row in rows] if is_packed else [[item] for item in items]
        return RowItems(parts, counted=sum(not isinstance(row, Repeated) for row in rows))
