"""Encode pre-tokenised rows: token ids, with columns that mask them."""

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
    """Token ids, unchanged. Tokens with the label −100, or a zero in a mask column, are not trained on."""
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
    """The mask columns that the rows have; without `completion_mask` if prompts are trained on as well."""
    if settings.assistant_only_loss and "assistant_masks" not in columns:
        raise DataError("assistant_only_loss=True needs a column 'assistant_masks' with pre-tokenised 'input_ids'.")
    if settings.completion_only_loss and "completion_mask" not in columns and "labels" not in columns:
        raise DataError("completion_only_loss=True needs a column 'completion_mask' with pre-tokenised 'input_ids'.")
    asked = {"completion_mask": settings.completion_only_loss is not False}
    return [
        name for name in ("labels", "completion_mask", "assistant_masks") if name in columns and asked.get(name, True)
    ]


def _keep(columns: Columns, name: str) -> list[list[bool]]:
    """For each row, which tokens are trained on by the mask or label column `name`."""
    keep = (lambda v: v != NOT_TRAINED) if name == "labels" else bool
    rows = columns.numbers(name)
    for k, (row, ids) in enumerate(zip(rows, columns["input_ids"], strict=True)):
        if len(row) != len(ids):
            raise columns.error(k, name, f"{len(row)} values for the {len(ids)} tokens of 'input_ids'.")
        if name == "labels" and any(v not in (NOT_TRAINED, t) for v, t in zip(row, ids, strict=True)):
            raise columns.error(
                k, name, f"a label has to be the token id in 'input_ids' or {NOT_TRAINED}; others were found."
            )
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
                f"{next(v for v in mask if v not in (0, 1))} numbers a document of a packed row, but earlier rows are not packed, or "
                "rows of this kind cannot be. Give the lengths of documents in a column 'seq_lengths'.",
            )
    return masks


def _present(values: Sequence[Any], attention: Sequence[int] | None) -> list[Any]:
    """The values of the tokens that are not padding."""
    return list(values) if attention is None else [v for v, keep in zip(values, attention, strict=True) if keep]


def tokenized_preference(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """Pairs from `input_ids_chosen` and `input_ids_rejected` with attention masks, where the common beginning is the prompt.

    Or from `chosen_ids` and `rejected_ids`, with the prompt in `prompt_ids` if that column exists.
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
