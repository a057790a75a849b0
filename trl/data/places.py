"""Add to errors about rows where the row is: the dataset, the user's row number, and the line of a `.jsonl` file.

A `RowError` is raised while a batch of rows is processed, where only the row's index is known. The context managers of this
file complete it on its way up: with the name of the dataset, with the original row number if rows were shuffled or split, and
with the file and line if the command line loaded the dataset from a file.
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
    """Within it, errors about rows name `dataset`."""
    try:
        yield
    except RowError as error:
        error.dataset = dataset
        raise


@contextmanager
def renumbering_rows(
    count: int | None, change: Callable[[Dataset], Dataset | IterableDataset], column: str
) -> Iterator[None]:
    """Within it, errors about rows that `change` made of `count` original rows give the number of the original row.

    To find it, `change` is applied to a dataset of row numbers, and the number is read from its `column`.
    """
    try:
        yield
    except RowError as error:
        if count is not None:
            error.row = numbers(count, change)[column][error.row]
        raise


def numbers(count: int, change: Callable[[Dataset], Dataset | IterableDataset]) -> Dataset:
    """The result of `change` on a dataset of `count` rows whose values are their row numbers."""
    from datasets import Dataset

    return change(Dataset.from_dict({name: range(count) for name in ("row", "chosen", "rejected")}))


@contextmanager
def naming_lines(script: ScriptArguments, mixture: DatasetMixtureConfig | None = None) -> Iterator[None]:
    """Within it, errors about rows that the command line loaded give the file and line, or the dataset of the mixture."""
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
    """`line 7 of chats.jsonl`, or `row 7 of 'org/chats'`, found by mixing row numbers in the way the rows were mixed."""
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
    """`line 7 of chats.jsonl`; empty if the rows do not come from files with one row per line."""
    files = files_of(path, split.partition("[")[0])
    if not files or not all(file.lower().endswith((".jsonl", ".ndjson")) and Path(file).is_file() for file in files):
        return ""
    lines = [(file, line) for file in files for line in _lines_with_rows(file)]
    start = range(len(lines))[slice_of(split, len(lines))].start
    file, line = lines[start + row]
    return f"line {line} of {Path(file).name}"


def _lines_with_rows(file: str) -> list[int]:
    """Numbers of the lines that hold a row, which are those that are not empty."""
    with open(file, encoding="utf-8") as text:
        return [number for number, line in enumerate(text, 1) if line.strip()]
