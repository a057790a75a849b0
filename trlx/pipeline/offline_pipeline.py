"""Tokenise prompts and dialogues.

    tokenize_dialogue(["Q: 1+1? A:", " 2"], tokenizer)     [DialogMessage(False, …), DialogMessage(True, … EOS)]

A sample that is a single text is an output with BOS as its prompt. Samples above the maximum length are truncated at the
tokenizer's `truncation_side`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from trl.errors import DataError
from trlx.pipeline import BasePipeline, register_datapipeline


@dataclass(frozen=True)
class DialogMessage:
    """A turn of a dialogue: whether it is an output of the model, and its token ids."""

    is_output: bool
    tokens: tuple[int, ...]


def tokenize_dialogue(
    dialogue: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int = 2048
) -> list[DialogMessage]:
    """Tokenise a dialogue into turns of at most `max_length` tokens in total; the last turn ends with EOS.

    `dialogue` is a text, or a list in which prompts and outputs alternate. Raises DataError for an odd number of turns, and for
    turns that are not strings.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if isinstance(dialogue, str):
        turns: list[list[int]] = [[start], _ids(tokenizer, dialogue)]
    else:
        _check(dialogue)
        turns = [_ids(tokenizer, text) for text in dialogue]
    if turns[-1][-1:] != [tokenizer.eos_token_id]:
        turns[-1] = [*turns[-1], tokenizer.eos_token_id]
    messages = [DialogMessage(i % 2 == 1, tuple(ids)) for i, ids in enumerate(turns)]
    kept = _cut(messages, max_length, tokenizer.truncation_side)
    if kept and kept[0].is_output:
        kept = _cut(kept, max_length - 1, tokenizer.truncation_side)
    return [DialogMessage(False, (start,)), *kept] if kept and kept[0].is_output else kept


def _check(dialogue: Any) -> None:
    if not isinstance(dialogue, Sequence) or not all(isinstance(turn, str) for turn in dialogue):
        raise DataError(
            f"A sample is a text, or a list in which prompts and outputs alternate; found {dialogue!r:.100}."
        )
    if len(dialogue) % 2 or not dialogue:
        raise DataError(
            f"In a dialogue, prompts and outputs alternate, so their number must be even: found {len(dialogue)}, "
            f"{list(dialogue)!r:.100}."
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _cut(messages: Sequence[DialogMessage], limit: int, side: str) -> list[DialogMessage]:
    """Truncate the messages to `limit` tokens in total, at their beginning ("left") or end ("right"); drop empty ones."""
    ordered = messages[::-1] if side == "left" else messages
    kept = []
    for message in ordered:
        length = max(0, min(len(message.tokens), limit))
        tokens = message.tokens[len(message.tokens) - length :] if side == "left" else message.tokens[:length]
        kept.append(replace(message, tokens=tokens))
        limit -= length
    return [m for m in (kept[::-1] if side == "left" else kept) if m.tokens]


def dialogue_row(messages: Sequence[DialogMessage], *, encoder_decoder: bool = False) -> dict[str, list[int]]:
    """Dataset row of a tokenised dialogue: `input_ids`, and `completion_mask`, which is 1 on outputs.

    For an encoder-decoder, `input_ids` are the prompt and `labels` the output. Raises DataError if there are other turns.
    """
    if encoder_decoder:
        if [m.is_output for m in messages] != [False, True]:
            raise DataError(
                f"An encoder-decoder needs one prompt and one output per sample: found {len(messages)} turns."
            )
        return {"input_ids": list(messages[0].tokens), "labels": list(messages[1].tokens)}
    ids = list(chain.from_iterable(m.tokens for m in messages))
    return {"input_ids": ids, "completion_mask": [int(m.is_output) for m in messages for _ in m.tokens]}


def dialogue_rows(
    samples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int, *, encoder_decoder: bool
) -> list[dict[str, list[int]]]:
    """Dataset rows of all samples. Raises DataError, with the index of the sample, for a malformed dialogue."""
    rows = []
    for i, sample in enumerate(samples):
        try:
            messages = tokenize_dialogue(sample, tokenizer, max_length)
            rows.append(dialogue_row(messages, encoder_decoder=encoder_decoder))
        except DataError as error:
            raise DataError(f"samples[{i}]: {error}") from error
    return rows


@register_datapipeline
class PromptPipeline(BasePipeline):
    """Rows of prompts: texts, or dicts with `prompt` and other columns, which reward and metric functions get as arguments.

    Prompts are truncated to `max_prompt_length` tokens.
    """

    def __init__(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        max_prompt_length: int,
        tokenizer: PreTrainedTokenizerBase,
        add_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        rows = [_row(prompt, i) for i, prompt in enumerate(prompts)]
        keys = set(rows[0]) if rows else set()
        for i, row in enumerate(rows):
            if set(row) != keys:
                raise DataError(
                    f"prompts[{i}] has the keys {sorted(row)}, the first one {sorted(keys)}: give all prompts the same keys."
                )
        ids = [tokenizer(row["prompt"], add_special_tokens=add_special_tokens).input_ids for row in rows]
        self.rows = [
            {**row, "input_ids": self._kept(each, max_prompt_length)} for row, each in zip(rows, ids, strict=True)
        ]

    def _kept(self, ids: list[int], limit: int) -> list[int]:
        return ids[max(0, len(ids) - limit) :] if self.tokenizer.truncation_side == "left" else ids[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {**row, "attention_mask": [1] * len(row["input_ids"])}

    def create_loader(self, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> DataLoader:
        """Batches with `input_ids` and `attention_mask` padded, and the other columns as lists."""
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=self._collate)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        padded = self.tokenizer.pad(
            {name: [row[name] for row in rows] for name in ("input_ids", "attention_mask")}, return_tensors="pt"
        )
        others = [name for name in rows[0] if name not in padded]
        return {**{k: torch.as_tensor(v) for k, v in padded.items()}, **{k: [row[k] for row in rows] for k in others}}


def _row(prompt: Any, i: int) -> dict[str, Any]:
    row = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt) if isinstance(prompt, Mapping) else {}
    if not isinstance(row.get("prompt"), str):
        raise DataError(f"prompts[{i}] is {prompt!r:.80}: give a text, or a dict with the text under 'prompt'.")
    return row
