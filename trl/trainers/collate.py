"""From dataset rows to examples: what the loader hands to the accumulation window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import datasets
from torch.utils.data import IterableDataset

from trl.data.encode import decode
from trl.errors import DataError
from trl.types import Completion, Example

IGNORE = -100


def collate_examples(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The examples of encoded rows; a packed row holds several."""
    return [example for row in rows for example in decode(row)]


def examples_from(data_collator: Callable) -> Callable[[Sequence[Mapping[str, Any]]], list[Example]]:
    """A user's collator as a source of examples.

    It is given rows with `input_ids`, and gives padded `input_ids`, `attention_mask` and `labels` `[B,T]`, as collators
    of `transformers` do; tokens whose label is −100 are not trained on.
    """

    def collate(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        flat = [{"input_ids": _flat(example)} for example in collate_examples(rows)]
        return _examples_of_tensors(data_collator(flat))

    return collate


def _flat(example: Example) -> list[int]:
    return [*example.prompt, *example.completions[0].ids]


def _examples_of_tensors(batch: Mapping[str, Any]) -> list[Example]:
    present = batch["attention_mask"].bool()
    return [
        Example([], (Completion(ids[here].tolist(), (labels[here] != IGNORE).long().tolist()),))
        for ids, labels, here in zip(batch["input_ids"], batch["labels"], present, strict=True)
    ]


class Endless(IterableDataset):
    """A stream of rows, from its beginning again when it ends: one epoch, in which every batch is full.

    Where training stands in it is then the number of batches alone. A shuffled stream has another order each time.
    """

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for epoch in count():
            self.rows.set_epoch(epoch)
            empty = True
            for row in self.rows:
                empty = False
                yield row
            if empty:
                raise DataError("The stream of training rows is empty: nothing is left of it, or it holds no row.")
