"""The classic collator that trains on answers only, which it finds by the text that introduces them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class DataCollatorForCompletionOnlyLM:
    """Pads rows of `input_ids`, and sets labels for the tokens of answers only.

    response_template: text or token ids that introduce an answer; the tokens after its last occurrence are trained on.
    instruction_template: text or token ids that introduce an instruction. With it every answer of a conversation is trained
        on, from a response template to the next instruction template.
    padding_free: rows are concatenated to a single row, with positions that restart.

    EOS is trained on even when it is also the pad token.

    Rows in which a template does not occur, because they were truncated before it, are not trained on, and the first is named in a
    warning. Raises DataError if no row had the templates yet.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        mlm: bool = False,
        ignore_index: int = -100,
        padding_free: bool = False,
    ) -> None:
        if mlm:
            raise ConfigError("mlm=True is masked language modelling, which is not supported here: set mlm=False.")
        self.tokenizer = tokenizer
        self.response = self._ids(response_template)
        self.instruction = None if instruction_template is None else self._ids(instruction_template)
        self.ignore_index = ignore_index
        self.padding_free = padding_free
        self._occurred = self._warned = False

    def _ids(self, template: str | Sequence[int]) -> list[int]:
        if isinstance(template, str):
            return self.tokenizer.encode(template, add_special_tokens=False)
        return list(template)

    def completion_mask(self, ids: Sequence[int], row: int) -> list[bool]:
        """True for the tokens of a row that are trained on: those after a response template. Errors name `row`."""
        if missing := self._missing(ids):
            raise DataError(self._not_found(missing, ids, row))
        answers = [start + len(self.response) for start in occurrences(ids, self.response)]
        if self.instruction is None:
            return [t >= answers[-1] for t in range(len(ids))]
        questions, mask = occurrences(ids, self.instruction), [False] * len(ids)
        for start in answers:
            end = next((q for q in questions if q >= start), len(ids))
            mask[start:end] = [True] * (end - start)
        return mask

    def _masks(self, rows: Sequence[Sequence[int]]) -> list[list[bool]]:
        """The masks of a batch of rows; False for all tokens of a row without a template, if other rows have them."""
        missing = [self._missing(ids) for ids in rows]
        self._occurred = self._occurred or not all(missing)
        if not self._occurred:
            raise DataError(self._not_found(missing[0], rows[0], 0))
        if any(missing) and not self._warned:
            self._warned = True
            row, kind = next((row, kind) for row, kind in enumerate(missing) if kind)
            logger.warning(f"{self._not_found(kind, rows[row], row)} Rows without it are not trained on.")
        return [
            [False] * len(ids) if kind else self.completion_mask(ids, row)
            for row, (ids, kind) in enumerate(zip(rows, missing, strict=True))
        ]

    def _missing(self, ids: Sequence[int]) -> str:
        """Which template does not occur in a row: "response" or "instruction"; "" if both do."""
        if not occurrences(ids, self.response):
            return "response"
        return "instruction" if self.instruction is not None and not occurrences(ids, self.instruction) else ""

    def _not_found(self, kind: str, ids: Sequence[int], row: int) -> str:
        template = self.response if kind == "response" else self.instruction or []
        text = self.tokenizer.decode(list(ids))
        return (
            f"Row {row + 1} of a batch: the {kind} template {self.tokenizer.decode(template)!r} (ids {template}) does not occur in "
            f"{text[:80] + '…' if len(text) > 80 else text!r}. A template may be tokenised differently within a text than "
            f"alone: give the token ids that occur in the rows as {kind}_template. Or the row was cut before it: raise max_length."
        )

    def __call__(self, examples: Sequence[Mapping[str, Any] | Sequence[int]]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `attention_mask` [B, T], or `input_ids`, `labels`, `position_ids` [1, ΣT]."""
        rows = [list(e["input_ids"] if isinstance(e, Mapping) else e) for e in examples]
        masked = [zip(ids, mask, strict=True) for ids, mask in zip(rows, self._masks(rows), strict=True)]
        labels = [[token if trained else self.ignore_index for token, trained in row] for row in masked]
        return self._flattened(rows, labels) if self.padding_free else self._padded(rows, labels)

    def _padded(self, rows: list[list[int]], labels: list[list[int]]) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        return {
            "input_ids": self._pad(rows, pad if pad is not None else 0),
            "attention_mask": self._pad([[1] * len(ids) for ids in rows], 0),
            "labels": self._pad(labels, self.ignore_index),
        }

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        side = self.tokenizer.padding_side
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    def _flattened(self, rows: list[list[int]], labels: list[list[int]]) -> dict[str, Tensor]:
        labels = [[self.ignore_index, *row[1:]] for row in labels]
        columns = {"input_ids": rows, "labels": labels, "position_ids": [range(len(ids)) for ids in rows]}
        return {name: torch.tensor([list(chain.from_iterable(values))]) for name, values in columns.items()}


def occurrences(ids: Sequence[int], template: Sequence[int]) -> list[int]:
    """Start indices of all occurrences of `template` in `ids`."""
    ids, template = list(ids), list(template)
    return [i for i in range(len(ids) - len(template) + 1) if ids[i : i + len(template)] == template]
