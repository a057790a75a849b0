"""The heaviest optimizer step of a run: what decides how much memory it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from trl.data.encode import decode
from trl.types import Completion, Example

ROWS_AT_ONCE = 10_000
PER_TOKEN = ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values", "returns")
"""Signals that online methods learn from."""


class LearnsFromRows(Protocol):
    """What is asked of a trainer; `algorithm` only where rows are prompts."""

    args: Any
    train_dataset: Any


def heaviest_window(trainer: LearnsFromRows) -> list[Example]:
    """As many of the longest rows as a step sees in one process; prompts with completions as long as they may become."""
    args, rows = trainer.args, trainer.train_dataset
    count = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = rows if isinstance(rows, Dataset) else list(rows)
    longest = np.resize(np.argsort(-row_tokens(rows), kind="stable")[:count], count)
    examples = [_blank(example) for i in longest.tolist() for example in decode(rows[i])]
    if examples[0].completions and max(map(len, examples[0].completions)):
        return list(map(_with_reference, examples))
    group, tokens = args.num_generations, args.max_completion_length or 512
    advantages = [0.0] * tokens if trainer.algorithm.needs_values else 0.0
    answer = Completion([0] * tokens, signals={n: [0.0] * tokens for n in PER_TOKEN} | {"advantages": advantages})
    prompts = examples[: max(1, count // group)]
    return [replace(example, completions=(answer,) * min(group, count)) for example in prompts]


def row_tokens(rows: Dataset | Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Tokens of every encoded row, all its completions or documents included."""
    if not isinstance(rows, Dataset):
        return np.array([sum(example.tokens for example in decode(row)) for row in rows])
    columns = [name for name in ("prompt_ids", "completion_ids") if name in rows.column_names] or ["input_ids"]
    tables = rows.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE)
    return np.concatenate([sum(_tokens(table[name].combine_chunks()) for name in columns) for table in tables])


def _tokens(lists: pa.ListArray) -> np.ndarray:
    """How many token ids are in every list, or list of lists."""
    if not pa.types.is_nested(lists.type.value_type):
        return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    inner = pc.list_value_length(pc.list_flatten(lists)).to_numpy(zero_copy_only=False)
    parents = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    return np.bincount(parents, weights=inner, minlength=len(lists)).astype(int)


def shortened(example: Example, share: float) -> Example:
    """The example with the beginning of its prompt and of each completion, `share` of them, and at least one token."""
    prompt = example.prompt[: ceil(len(example.prompt) * share)]
    return replace(example, prompt=prompt, completions=tuple(_cut(c, share) for c in example.completions))


def _cut(completion: Completion, share: float) -> Completion:
    end = max(1, ceil(len(completion) * share))
    per_token = {n: v for n, v in completion.signals.items() if isinstance(v, list) and len(v) == len(completion)}
    signals: dict[str, Any] = {**completion.signals, **{n: v[:end] for n, v in per_token.items()}}
    return Completion(completion.ids[:end], None, signals)


def _blank(example: Example) -> Example:
    """The example with a token of text in every place."""
    completions = (replace(completion, ids=[0] * len(completion)) for completion in example.completions)
    return replace(example, prompt=[0] * len(example.prompt), completions=tuple(completions))


def _with_reference(example: Example) -> Example:
    """The example with log-probabilities of a reference, as if they had been computed beforehand."""
    completions = (replace(c, signals={**c.signals, "ref_logprobs": [0.0] * len(c)}) for c in example.completions)
    return replace(example, completions=tuple(completions))
