"""The optimizer step of a run with the most tokens, which determines how much memory the run needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from trl.data.encode import decode, not_encoded
from trl.types import Completion, Example

ROWS_AT_ONCE = 10_000
DEARER = 50
"""How many rows can be read sequentially in the time of one random access. A shuffled dataset is a table with an index of its
rows: reading the whole table in order, and indexing the result, is often faster."""
PER_TOKEN = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values", "returns")
"""Per-token signals of online methods."""


class LearnsFromRows(Protocol):
    """The part of a trainer's interface that is used here; also `algorithm` for prompts."""

    args: Any
    layout: str
    train_dataset: Any


def heaviest_window(trainer: LearnsFromRows) -> list[Example]:
    """The largest rows of the dataset, as many as a step has per process. Prompts get completions of the maximal length."""
    args, rows = trainer.args, trainer.train_dataset
    count = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = rows if isinstance(rows, Dataset) else list(rows)
    sizes = row_positions(rows, trainer.layout)
    longest = np.resize(np.argsort(-sizes, kind="stable")[:count], count)
    examples = [_blank(example) for i in longest.tolist() for example in decode(rows[i])]
    if examples[0].completions and max(map(len, examples[0].completions)):
        return list(map(_with_reference, examples))
    group, tokens = args.num_generations, args.max_completion_length or 512
    advantages = [0.0] * tokens if trainer.algorithm.needs_values else 0.0
    answer = Completion([0] * tokens, signals={n: [0.0] * tokens for n in PER_TOKEN} | {"advantages": advantages})
    prompts = examples[: max(1, count // group)]
    return [replace(example, completions=(answer,) * min(group, count)) for example in prompts]


def row_positions(rows: Dataset | Sequence[Mapping[str, Any]], layout: str = "shared") -> np.ndarray:
    """Number of positions of every encoded row in a layout, with all of its completions or documents.

    Raises DataError for rows that are not encoded.
    """
    if not isinstance(rows, Dataset):
        return np.array([sum(_example_positions(example, layout) for example in decode(row)) for row in rows])
    columns = [name for name in ("prompt_ids", "completion_ids") if name in rows.column_names] or ["input_ids"]
    if not {*columns} <= {*rows.column_names}:
        raise not_encoded(rows.column_names)
    if rows._indices is None or len(rows) * DEARER < len(rows.data):
        tables = rows.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE)
        return np.concatenate([_table_positions(table, layout) for table in tables])
    batches = rows.data.table.select(columns).to_batches(max_chunksize=ROWS_AT_ONCE)
    positions = np.concatenate([_table_positions(pa.Table.from_batches([batch]), layout) for batch in batches])
    return positions[rows._indices.column(0).to_numpy()]


def _example_positions(example: Example, layout: str) -> int:
    sizes = [len(completion) for completion in example.completions] or [0]
    return int(_positions(layout, len(example.prompt), len(sizes), sum(sizes), max(sizes)))


def _table_positions(table: pa.Table, layout: str) -> np.ndarray:
    """Number of positions of each row of a table: with a column of prompts and maybe completions, or of packed documents."""
    first, *others = (column.combine_chunks() for column in table.columns)
    lengths = pc.fill_null(pc.list_value_length(first), 0).to_numpy(zero_copy_only=False)
    return _positions(layout, lengths, *(_completions(others[0]) if others else (1, 0, 0)))


def _completions(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every row: the number of completions (at least 1), of their tokens, and of the tokens of the longest."""
    sizes = pc.list_value_length(pc.list_flatten(lists)).to_numpy(zero_copy_only=False)
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    total, longest = np.zeros((2, len(lists)), dtype=int)
    np.add.at(total, parents, sizes)
    np.maximum.at(longest, parents, sizes)
    return np.maximum(np.bincount(parents, minlength=len(lists)), 1), total, longest


def _positions(layout: str, prompt: Any, count: Any, total: Any, longest: Any) -> Any:
    """Number of positions of a prompt and its `count` completions, with `total` tokens in all and `longest` in the longest."""
    if layout == "padded":
        return count * (prompt + longest)
    return (count if layout == "packed" else 1) * prompt + total


def shortened(example: Example, share: float) -> Example:
    """Truncate the prompt and each completion of an example to the fraction `share`, and at least one token."""
    prompt = example.prompt[: ceil(len(example.prompt) * share)]
    return replace(example, prompt=prompt, completions=tuple(_cut(c, share) for c in example.completions))


def _cut(completion: Completion, share: float) -> Completion:
    end = max(1, ceil(len(completion) * share))
    per_token = {n: v for n, v in completion.signals.items() if isinstance(v, list) and len(v) == len(completion)}
    signals: dict[str, Any] = {**completion.signals, **{n: v[:end] for n, v in per_token.items()}}
    return Completion(completion.ids[:end], None, signals)


def _blank(example: Example) -> Example:
    """Replace all tokens of the example by token 0, which stands for no image."""
    completions = (replace(completion, ids=[0] * len(completion)) for completion in example.completions)
    return replace(example, prompt=[0] * len(example.prompt), completions=tuple(completions))


def _with_reference(example: Example) -> Example:
    """Add precomputed reference log-probabilities (zeros) to the example."""
    completions = (replace(c, signals={**c.signals, "ref_logprobs": [0.0] * len(c)}) for c in example.completions)
    return replace(example, completions=tuple(completions))
