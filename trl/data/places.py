"""Where a row stands: in which dataset of a trainer, and at which line of a `.jsonl` file.

A `RowError` is raised where a batch of rows is read, and knows a number alone. On its way up it learns the dataset, what row of the
user's it is where rows were shuffled or taken apart, and the line where the command line has read a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trl.data.mixtures import DatasetMixtureConfig, parts_of, splits_of
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
def naming_lines(script: ScriptArguments, mixture: DatasetMixtureConfig | None = None) -> Iterator[None]:
    """Errors about rows that the command line has read say where these stand in files, or in datasets of the mixture."""
    try:
        yield
    except RowError as error:
        if error.dataset and mixture is not None and mixture.datasets and not mixture.streaming:
            error.place = _place_in_mixture(mixture, TRAIN if error.dataset == TRAIN else "test", error.row)
        elif error.dataset and script.dataset_name and not script.dataset_streaming:
            split = script.dataset_train_split if error.dataset == TRAIN else script.dataset_test_split
            error.place = _place(script.dataset_name, split, error.row)
        raise


def _place_in_mixture(mixture: DatasetMixtureConfig, split: str, row: int) -> str:
    """`line 7 of chats.jsonl`, or `row 7 of 'org/chats'`: numbers are mixed as the rows were."""
    from datasets import Dataset

    parts = [
        Dataset.from_dict({"part": [i] * len(rows), "row": range(len(rows))})
        for i, rows in enumerate(parts_of(mixture))
    ]
    found = splits_of(parts, mixture)[split][row]
    source = mixture.datasets[found["part"]]
    place = _place(source.path, source.split, found["row"]) if source.data_files is None else ""
    return place or f"row {found['row'] + 1} of {source.path!r}"


def _place(path: str | Sequence[str], split: str, row: int) -> str:
    """`line 7 of chats.jsonl`; empty where rows have no lines."""
    files = files_of(path, split.partition("[")[0])
    if not files or not all(file.lower().endswith((".jsonl", ".ndjson")) and Path(file).is_file() for file in files):
        return ""
    lines = [(file, line) for file in files for line in _lines_with_rows(file)]
    start = range(len(lines))[slice_of(split, len(lines))].start
    file, line = lines[start + row]
    return f"line {line} of {Path(file).name}"


def _lines_with_rows(file: str) -> list[int]:
    """Numbers of the lines that are rows: those that are not empty."""
    with open(file, encoding="utf-8") as text:
        return [number for number, line in enumerate(text, 1) if line.strip()]
