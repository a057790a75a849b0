"""Rows that come as token ids, with the columns that mask them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl.data.columns import Columns
from trl.data.settings import EncodeSettings
from trl.data.tokenization import Tokenization
from trl.data.trees import Tree, fork
from trl.errors import DataError

NOT_TRAINED = -100
"""The label of tokens that are not trained on, as everywhere in transformers."""


def tokenized(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """Token ids as they are. Labels of −100, and zeros of the mask columns, take tokens out of training."""
    ids = columns.ids("input_ids", tokenization.settings.vocabulary)
    if tokenization.settings.encoder_decoder and "labels" in columns:
        targets = [[t for t in labels if t != NOT_TRAINED] for labels in columns.numbers("labels")]
        return [Tree(list(prompt), [target]) for prompt, target in zip(ids, targets, strict=True)]
    keeps = [_keep(columns, name) for name in _mask_columns(columns, tokenization.settings)]
    masks = [[all(token) for token in zip(*row, strict=True)] for row in zip(*keeps, strict=True)] if keeps else None
    attention = _attention(columns, "attention_mask")
    return [
        Tree([], [_present(row, seen)], masks and [_present(masks[k], seen)])
        for k, (row, seen) in enumerate(zip(ids, attention, strict=True))
    ]


def _mask_columns(columns: Columns, settings: EncodeSettings) -> list[str]:
    """The columns that say which tokens are trained on: all that there are, unless prompts are asked for as well."""
    if settings.assistant_only_loss and "assistant_masks" not in columns:
        raise DataError("assistant_only_loss=True needs a column 'assistant_masks' beside pre-tokenised 'input_ids'.")
    if settings.completion_only_loss and "completion_mask" not in columns and "labels" not in columns:
        raise DataError("completion_only_loss=True needs a column 'completion_mask' beside pre-tokenised 'input_ids'.")
    asked = {"completion_mask": settings.completion_only_loss is not False}
    return [
        name for name in ("labels", "completion_mask", "assistant_masks") if name in columns and asked.get(name, True)
    ]


def _keep(columns: Columns, name: str) -> list[list[bool]]:
    """Which tokens of each row a mask or label column trains on."""
    keep = (lambda v: v != NOT_TRAINED) if name == "labels" else bool
    rows = columns.numbers(name)
    for k, (row, ids) in enumerate(zip(rows, columns["input_ids"], strict=True)):
        if len(row) != len(ids):
            raise columns.error(k, name, f"{len(row)} values for the {len(ids)} tokens of 'input_ids'.")
        if name == "labels" and any(v not in (NOT_TRAINED, t) for v, t in zip(row, ids, strict=True)):
            raise columns.error(k, name, f"a label is the token of 'input_ids' or {NOT_TRAINED}; here others occur.")
    return [[keep(value) for value in row] for row in rows]


def _attention(columns: Columns, name: str) -> Sequence[Sequence[int] | None]:
    if name not in columns:
        return [None] * len(columns.rows)
    masks = columns.numbers(name)
    ids = columns[name.replace("attention_mask", "input_ids")]
    for k, (mask, row) in enumerate(zip(masks, ids, strict=True)):
        if len(mask) != len(row):
            raise columns.error(k, name, f"{len(mask)} values for the {len(row)} tokens of the row.")
        if not columns.is_packed and any(value not in (0, 1) for value in mask):
            raise columns.error(
                k,
                name,
                f"{next(v for v in mask if v not in (0, 1))} numbers documents of a packed row, and the rows before hold one "
                "each, or rows of this kind do. Give the lengths of documents as a column 'seq_lengths'.",
            )
    return masks


def _present(values: Sequence[Any], attention: Sequence[int] | None) -> list[Any]:
    """The values of tokens that are no padding."""
    return list(values) if attention is None else [v for v, keep in zip(values, attention, strict=True) if keep]


def tokenized_preference(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """`input_ids_chosen`, `input_ids_rejected` and their attention masks: the common beginning is the prompt.

    Or `chosen_ids`, `rejected_ids`, and `prompt_ids` before both where they are.
    """
    size = tokenization.settings.vocabulary
    if "chosen_ids" in columns:
        pairs = zip(columns.ids("chosen_ids", size), columns.ids("rejected_ids", size), strict=True)
        if "prompt_ids" not in columns:
            return [fork(list(chosen), list(rejected)) for chosen, rejected in pairs]
        prompts = columns.ids("prompt_ids", size)
        return [Tree(list(p), [list(c), list(r)]) for p, (c, r) in zip(prompts, pairs, strict=True)]
    sides = [
        map(_present, columns.ids(f"input_ids_{side}", size), _attention(columns, f"attention_mask_{side}"))
        for side in ("chosen", "rejected")
    ]
    return [fork(chosen, rejected) for chosen, rejected in zip(*sides, strict=True)]
