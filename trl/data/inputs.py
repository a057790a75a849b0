"""Join the model inputs of prompts other than token ids (pixel values, token types, …) for a whole grid.

    pixel_values   of two prompts  [1,3,H,W], [2,3,H,W]   ─Concatenated()─▶  [3,3,H,W]
    token_type_ids of two prompts  [P₁], [P₂]             ─PerToken()─────▶  [B,T]

Models replace image tokens by image features in the order of the flattened grid. So inputs are concatenated in the order in
which prompts are placed, once for each time that a prompt occurs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.errors import DataError
from trl.types import Concatenated, Example, Join, PerToken

BY_DEFAULT = Concatenated()
"""How inputs without an entry in `joins` are joined."""


def joined(
    examples: Sequence[Example], joins: Mapping[str, Join], starts: Sequence[int], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """The joined inputs of all examples, by name. `starts` are the flat indices at which examples begin in the grid `[B,T]`."""
    names = dict.fromkeys(name for example in examples for name in example.inputs)
    found = {}
    for name in names:
        join = joins.get(name, BY_DEFAULT)
        if isinstance(join, PerToken):
            found[name] = _per_token(name, join, examples, starts, shape)
        else:
            found[name] = concatenated([e.inputs[name] for e in examples if name in e.inputs], join.dim, join.fill)
    return found


def concatenated(values: Sequence[Tensor], dim: int = 0, fill: int = 0) -> Tensor:
    """Concatenate tensors along `dim`, after padding their other dimensions with `fill` to the largest."""
    if len({v.shape[:dim] + v.shape[dim + 1 :] for v in values}) == 1:
        return torch.cat(list(values), dim)
    largest = [max(sizes) for sizes in zip(*(v.shape for v in values), strict=True)]
    largest[dim] = sum(v.shape[dim] for v in values)
    whole, at = values[0].new_full(largest, fill), 0
    for value in values:
        end = at + value.shape[dim]
        place = [slice(size) for size in value.shape]
        place[dim] = slice(at, end)
        whole[tuple(place)] = value
        at = end
    return whole


def _per_token(
    name: str, join: PerToken, examples: Sequence[Example], starts: Sequence[int], shape: tuple[int, int]
) -> Tensor:
    first = next(e.inputs[name] for e in examples if name in e.inputs)
    grid = torch.full(shape, join.padding, dtype=first.dtype).flatten()
    for example, start in zip(examples, starts, strict=True):
        prompt, end = start + len(example.prompt), start + example.tokens
        grid[prompt:end] = join.completion
        if name in example.inputs:
            values = example.inputs[name]
            grid[start : start + len(values)] = values
    return grid.view(shape)


def check_inputs(examples: Sequence[Example], joins: Mapping[str, Join]) -> None:
    """Raise DataError for per-token inputs that are not `[L]` with L = P, or P ≤ L ≤ P + C if there is one completion."""
    for example in examples:
        prompt = len(example.prompt)
        longest = example.tokens if len(example.completions) == 1 else prompt
        for name, values in example.inputs.items():
            fits = not isinstance(joins.get(name), PerToken) or (values.dim() == 1 and prompt <= len(values) <= longest)
            if not fits:
                raise DataError(
                    f"The input {name!r} needs one value per token, but its shape is {tuple(values.shape)} and the prompt has "
                    f"{prompt} tokens. Give a tensor with as many values, and do not let prompts be truncated."
                )


def batched(
    rows: Sequence[Mapping[str, Any]], joins: Mapping[str, Join], lengths: Sequence[int], *, left: bool
) -> dict:
    """The joined inputs of a batch of prompts, one per row, of each of which the first `lengths[i]` tokens are used.

    With `left`, padding comes before the tokens, else after them.
    """
    width = max(lengths)
    prompts = [
        Example(range(n), (), {k: v[:n] if isinstance(joins.get(k), PerToken) else v for k, v in inputs.items()})
        for n, inputs in zip(lengths, rows, strict=True)
    ]
    starts = [row * width + (width - n if left else 0) for row, n in enumerate(lengths)]
    return joined(prompts, joins, starts, (len(rows), width))
