"""Packing: several documents per row, so that rows have almost no padding.

Best fit decreasing: documents are placed from the longest to the shortest, each in the fullest row that has room for it. It
needs at most 11/9 of the smallest possible number of rows (Johnson, 1973), up to a constant. A bit set holds the amounts of
free space that occur in rows; the best fit for a document is the lowest bit that is set at its length or above.

Each packed row has the lengths of its documents in `seq_lengths`, and attention does not cross their borders. This holds
for `wrapped` too, where the pieces of a split document count as separate documents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from trl.counts import counted, percent
from trl.data.formats import AnyDataset
from trl.data.multimodal import IMAGES
from trl.errors import ConfigError, DataError, unknown

logger = logging.getLogger(__name__)

Ints = np.ndarray


@dataclass(frozen=True)
class Pieces:
    """Slices of a flat array of tokens, in the order in which they are placed.

    start [P], length [P] of each piece; row r has the pieces rows[r] … rows[r + 1] − 1.
    """

    start: Ints
    length: Ints
    rows: Ints


def ranges(start: Ints, length: Ints) -> Ints:
    """The concatenated ranges start₀ … start₀+length₀−1, start₁ … start₁+length₁−1, …"""
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(length.sum())


def best_fit_decreasing(lengths: Ints, capacity: int) -> list[list[int]]:
    """For each row of `capacity` tokens, the indices of the documents in it, the longest first."""
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        enough = spaces >> length
        space = length + (enough & -enough).bit_length() - 1 if enough else capacity
        if enough:
            row = with_space[space].pop()
            spaces ^= 0 if with_space[space] else 1 << space
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        with_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return rows


def truncated_fit(lengths: Ints, capacity: int) -> Pieces:
    """Best fit of documents truncated to `capacity`; empty documents are dropped."""
    filled = lengths > 0
    return _fitted(_starts(lengths)[filled], np.minimum(lengths, capacity)[filled], capacity)


def split_fit(lengths: Ints, capacity: int) -> Pieces:
    """Best fit of documents split into pieces of `capacity` tokens and a remainder."""
    count = -(-lengths // capacity)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start = np.repeat(_starts(lengths), count) + within * capacity
    return _fitted(start, np.minimum(capacity, np.repeat(lengths, count) - within * capacity), capacity)


def wrapped(lengths: Ints, capacity: int) -> Pieces:
    """Concatenate documents, and split them wherever a row is full."""
    total = int(lengths.sum())
    bounds = np.union1d(np.arange(0, total + capacity, capacity).clip(max=total), np.cumsum(lengths))
    start, length = bounds[:-1], np.diff(bounds)
    return Pieces(start, length, np.searchsorted(start, np.arange(0, total + capacity, capacity)))


def _fitted(start: Ints, length: Ints, capacity: int) -> Pieces:
    rows = best_fit_decreasing(length, capacity)
    order = np.array([piece for row in rows for piece in row], np.int64)
    return Pieces(start[order], length[order], np.cumsum([0, *map(len, rows)]))


def _starts(lengths: Ints) -> Ints:
    return np.cumsum(lengths) - lengths


STRATEGIES: dict[str, Callable[[Ints, int], Pieces]] = {
    "bfd": truncated_fit,
    "bfd_split": split_fit,
    "wrapped": wrapped,
}


def pack_dataset(
    dataset: AnyDataset, seq_length: int, strategy: str = "bfd", map_kwargs: Mapping[str, Any] | None = None
) -> AnyDataset:
    """Pack rows of token lists into rows of at most `seq_length` tokens.

    In every row, all columns must hold lists of the same length. A column `seq_lengths` is added with the lengths of the
    documents in each row.

    strategy: `bfd` is best fit decreasing, and truncates documents longer than `seq_length`; `bfd_split` splits them instead,
        so that no token is lost; `wrapped` concatenates documents, and splits them where a row is full.
    map_kwargs: arguments for the dataset's `map`; documents are packed within each of its batches.

    Raises ConfigError for an unknown strategy, DataError for a column that does not hold lists.
    """
    _check(strategy, seq_length)
    pack = partial(_pack_table, capacity=seq_length, strategy=strategy)
    return _map_tables(dataset, pack, **(map_kwargs or {}))


def _check(strategy: str, capacity: int) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(unknown("packing strategy", strategy, STRATEGIES))
    if capacity < 1:
        raise ConfigError(f"seq_length={capacity} leaves no room for a token: give a positive number.")


def _map_tables(dataset: AnyDataset, function: Callable[[pa.Table], pa.Table], **map_kwargs: Any) -> AnyDataset:
    """`dataset.map` for a function from Arrow tables to Arrow tables."""
    return dataset.with_format("arrow").map(function, batched=True, **map_kwargs).with_format(None)


def _pack_table(table: pa.Table, *, capacity: int, strategy: str) -> pa.Table:
    lists = {name: _list_column(table, name) for name in table.column_names}
    lengths = {name: column.value_lengths().to_numpy() for name, column in lists.items()}
    first, *others = lengths
    for name in others:
        if not np.array_equal(lengths[name], lengths[first]):
            row = int(np.flatnonzero(lengths[name] != lengths[first])[0])
            raise DataError(
                f"Row {row + 1} of a batch has {lengths[name][row]} values in {name!r} and {lengths[first][row]} in "
                f"{first!r}. Packing needs one value per token in every column; remove the others."
            )
    pieces = STRATEGIES[strategy](lengths[first].astype(np.int64), capacity)
    return pack_columns(pieces, {name: column.flatten() for name, column in lists.items()})


def _list_column(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name].combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"Packing needs lists of tokens in every column, but {name!r} holds {column.type}. Remove it.")
    return column


def _values(lists: pa.ListArray) -> Ints:
    """The concatenated values of all lists."""
    return lists.flatten().to_numpy(zero_copy_only=False)


def pack_columns(pieces: Pieces, flat: Mapping[str, pa.Array]) -> pa.Table:
    """The packed rows: one list column for each flat array, and `seq_lengths`."""
    ends = np.concatenate([[0], np.cumsum(pieces.length)])
    bounds, tokens = pa.array(ends[pieces.rows], pa.int32()), pa.array(ranges(pieces.start, pieces.length))
    columns = {name: pa.ListArray.from_arrays(bounds, values.take(tokens)) for name, values in flat.items()}
    documents = pa.ListArray.from_arrays(pa.array(pieces.rows, pa.int32()), pa.array(pieces.length, pa.int32()))
    return pa.table({**columns, "seq_lengths": documents})


@dataclass(frozen=True)
class PackingReport:
    """Counts of rows and tokens before and after packing."""

    rows_in: int
    tokens_in: int
    rows: int
    documents: int
    tokens: int
    trained: int
    capacity: int

    @property
    def lost(self) -> int:
        """Number of tokens that were cut off, or belong to documents with no token to train on."""
        return self.tokens_in - self.tokens

    def __str__(self) -> str:
        filled = percent(self.tokens, self.rows * self.capacity, digits=1)
        text = f"packed {counted(self.rows_in, 'row')} into {self.rows:,} of {self.capacity:,} tokens, {filled} filled"
        return f"{text}, {self.lost:,} tokens cut off." if self.lost else f"{text}."


def pack_examples(
    dataset: Dataset | IterableDataset, max_length: int, strategy: str = "bfd"
) -> tuple[Dataset | IterableDataset, PackingReport | None]:
    """Pack encoded rows with one completion each into rows of at most `max_length` tokens.

    A packed row has `input_ids`, `mask` (the tokens to train on) and `seq_lengths`; `decode` gives one Example per
    document. Documents with no token left to train on are dropped. The report is logged; for a stream it is None.

    Raises DataError for rows with several completions.
    """
    _check(strategy, max_length)
    pack = partial(_pack_trees, capacity=max_length, strategy=strategy)
    if isinstance(dataset, IterableDataset):
        return _map_tables(dataset, pack, remove_columns=dataset.column_names), None
    packed = _map_tables(dataset, pack, remove_columns=dataset.column_names, desc="Packing")
    if not len(packed):
        raise DataError(f"Packing to {max_length} tokens left no document with a token to train on. Raise max_length.")
    report = _report(dataset, packed, max_length)
    logger.log(logging.WARNING if report.lost else logging.INFO, "%s", report)
    return packed, report


def _pack_trees(table: pa.Table, *, capacity: int, strategy: str) -> pa.Table:
    completions = table["completion_ids"].combine_chunks()
    if not (completions.value_lengths().to_numpy() == 1).all():
        raise DataError(
            "Packing needs rows of one completion, but these have several (preferences). Set packing=False."
        )
    prompts, answers = _list_column(table, "prompt_ids"), completions.flatten()
    prompt_lengths, answer_lengths = (a.value_lengths().to_numpy().astype(np.int64) for a in (prompts, answers))
    lengths = prompt_lengths + answer_lengths
    in_prompt = ranges(_starts(lengths), prompt_lengths)
    in_answer = ranges(_starts(lengths) + prompt_lengths, answer_lengths)
    ids, mask = np.empty(lengths.sum(), np.int32), np.zeros(lengths.sum(), bool)
    ids[in_prompt], ids[in_answer] = _values(prompts), _values(answers)
    is_masked = "completion_mask" in table.column_names
    mask[in_answer] = _values(table["completion_mask"].combine_chunks().flatten()) if is_masked else True
    pieces = STRATEGIES[strategy](lengths, capacity)
    mask[pieces.start[pieces.length > 0]] = False  # nothing predicts a document's first token
    pieces = _trained_pieces(pieces, mask)
    packed = pack_columns(pieces, {"input_ids": pa.array(ids), "mask": pa.array(mask)})
    return packed if IMAGES not in table.column_names else _with_images(packed, table[IMAGES], pieces, lengths)


def _with_images(packed: pa.Table, images: pa.ChunkedArray, pieces: Pieces, lengths: Ints) -> pa.Table:
    """The packed rows with the images of their documents, in order, and the number of images of each document."""
    own = images.combine_chunks().take(pa.array(np.searchsorted(np.cumsum(lengths), pieces.start, side="right")))
    counts = own.value_lengths().to_numpy()
    bounds = np.concatenate([[0], np.cumsum(counts)])[pieces.rows]
    held = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), own.flatten())
    numbers = pa.ListArray.from_arrays(pa.array(pieces.rows, pa.int32()), pa.array(counts, pa.int32()))
    return packed.append_column(IMAGES, held).append_column("image_counts", numbers)


def _trained_pieces(pieces: Pieces, mask: Ints) -> Pieces:
    """The pieces that have a token to train on."""
    before = np.concatenate([[0], np.cumsum(mask)])
    trains = before[pieces.start + pieces.length] > before[pieces.start]
    bounds = np.concatenate([[0], np.cumsum(trains)])[pieces.rows]
    return Pieces(pieces.start[trains], pieces.length[trains], np.unique(bounds))


def _report(dataset: Dataset, packed: Dataset, capacity: int) -> PackingReport:
    tokens_in = sum(
        len(table["prompt_ids"].combine_chunks().flatten())
        + len(table["completion_ids"].combine_chunks().flatten().flatten())
        for table in dataset.with_format("arrow").iter(batch_size=10_000)
    )
    documents, trained, tokens = 0, 0, 0
    for table in packed.with_format("arrow").iter(batch_size=10_000):
        lengths = _values(table["seq_lengths"].combine_chunks())
        mask = _values(table["mask"].combine_chunks())
        documents, tokens = documents + len(lengths), tokens + len(mask)
        trained += int(mask.sum())
    return PackingReport(len(dataset), tokens_in, len(packed), documents, tokens, trained, capacity)
