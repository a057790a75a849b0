"""Where a row stands: in which dataset of a trainer, and at which line of a `.jsonl` file.

A `RowError` is raised where a batch of rows is read, and knows a number alone. On its way up it learns the dataset, what row of the
user's it is where rows were shuffled or taken apart, and the line where the command line has read a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trl.data.sources import ScriptArguments, files_of, slice_of
from trl.errors import RowError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TRAIN = "train"


@contextmanager
def naming_rows(dataset: str) -> Iterator[None]:
    """Errors about rows meanwhile are about those of `dataset`."""
    try:
        yield
    except RowError as error:
        error.dataset = dataset
        raise


@contextmanager
def renumbering_rows(
    count: int | None, change: Callable[[Dataset], Dataset | IterableDataset], column: str
) -> Iterator[None]:
    """Errors about rows that `change` made of `count` others are about those.

    The same is done to numbers, in place of rows, and the error's is looked up in the `column` that holds them afterwards.
    """
    try:
        yield
    except RowError as error:
        if count is not None:
            error.row = numbers(count, change)[column][error.row]
        raise


def numbers(count: int, change: Callable[[Dataset], Dataset | IterableDataset]) -> Dataset:
    """What `change` makes of rows that are their own numbers."""
    from datasets import Dataset

    return change(Dataset.from_dict({name: range(count) for name in ("row", "chosen", "rejected")}))


@contextmanager
def naming_lines(script: ScriptArguments) -> Iterator[None]:
    """Errors about rows of a `.jsonl` file that `dataset_name` led to say their line."""
    try:
        yield
    except RowError as error:
        split = script.dataset_train_split if error.dataset == TRAIN else script.dataset_test_split
        if script.dataset_name and error.dataset and not script.dataset_streaming:
            error.place = _place(script.dataset_name, split, error.row)
        raise


def _place(path: str | Sequence[str], split: str, row: int) -> str:
    """`line 7 of chats.jsonl`; empty where rows have no lines."""
    files = files_of(path, split.partition("[")[0])
    if not files or not all(file.endswith(".jsonl") and Path(file).is_file() for file in files):
        return ""
    lines = [(file, line) for file in files for line in _lines_with_rows(file)]
    start = range(len(lines))[slice_of(split, len(lines))].start
    file, line = lines[start + row]
    return f"line {line} of {Path(file).name}"


def _lines_with_rows(file: str) -> list[int]:
    """Numbers of the lines that are rows: those that are not empty."""
    with open(file, encoding="utf-8") as text:
        return [number for number, line in enumerate(text, 1) if line.strip()]
