"""Checks a user's triplets (query, response, score), and converts them to examples of one prompt and one completion.

Examples with equal prompts are merged within a micro-batch, so that the prompt is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from trl.errors import DataError
from trl.types import Completion, Example


def read_triplets(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    *,
    batch_size: int,
    start_token: int | None = None,
    vocabulary: int | None = None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
) -> list[Example]:
    """The triplets of a batch, each a prompt with one completion; ids of shape `[L]` or `[1,L]`. `masks` have the
    shapes of `responses`.

    `inputs` are the model's other inputs for each query: see `trl.types.Example`. A leading `start_token`, with which an
    encoder-decoder's responses begin, is removed. Ids have to be below `vocabulary`, unless it is None.

    Raises DataError, with the argument and the index, for triplets that cannot be trained on.
    """
    named = {"queries": queries, "responses": responses, "response_masks": masks, "query_inputs": inputs}
    for name, given in named.items():
        if given is not None:
            _check_list(name, given, batch_size)
    examples = []
    for i in range(batch_size):
        query, response = (_ids(name, i, named[name][i], vocabulary) for name in ("queries", "responses"))
        mask = (1,) * len(response) if masks is None else _mask(i, masks[i], len(response))
        starts = len(response) > 0 and response[0] == start_token
        response, mask = response[starts:], mask[starts:]
        if not query:
            raise DataError(f"queries[{i}] is empty: give at least one token (a beginning-of-sequence token, say).")
        if not response:
            raise DataError(
                f"responses[{i}] is empty: sample at least one token, or leave the sample out of the batch."
            )
        if not any(mask):
            raise DataError(
                f"response_masks[{i}] masks all {len(mask)} tokens of its response: none is left to learn from."
            )
        examples.append(Example(query, (Completion(response, mask),), {} if inputs is None else inputs[i]))
    return examples


def read_scores(scores: Sequence[Any], *, batch_size: int) -> Tensor:
    """Scores `[N]` float32, from tensors or numbers. Raises DataError, with the index, for any that is no finite scalar."""
    _check_list("scores", scores, batch_size)
    values = []
    for i, score in enumerate(scores):
        found = torch.as_tensor(score)
        if found.numel() != 1:
            raise DataError(f"scores[{i}] has shape {tuple(found.shape)}: a score is one number per response.")
        value = float(found)
        if not math.isfinite(value):
            raise DataError(f"scores[{i}] is {value}: give a finite number for this query and response.")
        values.append(value)
    return torch.tensor(values)


def _check_list(name: str, given: Any, batch_size: int) -> None:
    if not isinstance(given, list | tuple):
        raise DataError(f"{name} has to be a list with one tensor per sample, got {type(given).__name__}.")
    if len(given) != batch_size:
        raise DataError(
            f"{name} has {len(given)} entries, but batch_size={batch_size}: step() takes a whole batch. Give "
            f"{batch_size}, or set batch_size={len(given)} in PPOConfig."
        )


def _ids(name: str, i: int, given: Any, vocabulary: int | None) -> tuple[int, ...]:
    if not isinstance(given, Tensor):
        raise DataError(f"{name}[{i}] has to be a tensor of token ids, got {type(given).__name__}.")
    if given.dim() > 2 or (given.dim() == 2 and len(given) != 1):
        raise DataError(f"{name}[{i}] has shape {tuple(given.shape)}: give one sequence, of shape [L] or [1, L].")
    if given.is_floating_point():
        raise DataError(f"{name}[{i}] holds {given.dtype} numbers: token ids are integers.")
    ids = tuple(given.flatten().tolist())
    if wrong := [token for token in ids if token < 0 or (vocabulary is not None and token >= vocabulary)]:
        raise DataError(
            f"{name}[{i}] holds the token {wrong[0]}, but those of the model are 0 to {(vocabulary or 0) - 1:,}: was it made "
            "by another tokenizer, or padded with -100?"
        )
    return ids


def _mask(i: int, given: Tensor, length: int) -> tuple[int, ...]:
    mask = tuple(int(bool(x)) for x in given.flatten().tolist())
    if len(mask) != length:
        raise DataError(f"response_masks[{i}] has {len(mask)} entries for the {length} tokens of responses[{i}].")
    return mask


def prompt_numbers(examples: Iterable[Example]) -> list[int]:
    """Number the distinct prompts 0, 1, … in order of appearance; return the number of each example's prompt."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(example.key, len(numbers)) for example in examples]


def adjacent_by_prompt(examples: Sequence[Example], group: Sequence[int]) -> list[int]:
    """Sort the indices `group` of examples so that those with equal prompts are next to each other."""
    numbers = dict(zip(group, prompt_numbers(examples[i] for i in group), strict=True))
    return sorted(group, key=numbers.__getitem__)


def merge_neighbours(examples: Sequence[Example]) -> list[Example]:
    """Merge neighbouring examples with equal prompts into one with all of their completions."""
    merged = []
    for _, same in groupby(examples, key=attrgetter("key")):
        first, *others = same
        completions = chain(first.completions, *(other.completions for other in others))
        merged.append(replace(first, completions=tuple(completions)))
    return merged
