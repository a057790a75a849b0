"""Layouts: how the sequences of a micro-batch are placed in the B·T grid of one forward pass.

padded   one row per completion, with its prompt repeated
packed   several sequences per row; positions restart, and no sequence attends to another
shared   each prompt once, with its K completions as branches: a completion attends to the prompt and to itself

All three give the same log-probabilities and gradients, at different cost. They are built in the same way, by placing
examples (a prompt and its completions) in rows: `padded` and `packed` first split each example into examples with one
completion, and `padded` gives each of those its own row.

    2 completions            p0 p1 p2 | a0 a1 | b0 b1 b2      positions  0 1 2 | 3 4 | 3 4 5
    predictor of a           p2 a0                            predictor of b   p2 b0 b1

The predictor of a completion's first token is the last token of the prompt; without a prompt there is none, and the first
token is not scored. In an encoder-decoder the prompt goes to the encoder, once per example, and the decoder's start token
predicts the first token.

Further model inputs of a prompt (pixel values, token types, …) are joined by `trl.data.inputs`: once if the prompt is
shared, and as often as the prompt if it is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from trl.data.inputs import check_inputs, joined
from trl.data.row_widths import rows_of
from trl.errors import ConfigError, DataError, unknown
from trl.types import Batch, Completion, Example, Join, PerToken, Segments, Spans

PADDING = -1
LONGEST = 1024
"""Least value of the longest-run arguments of variable-length attention where shapes are bucketed; it costs almost nothing."""


def lay_out(
    examples: Sequence[Example],
    layout: str = "padded",
    *,
    pad_token_id: int = 0,
    capacity: int | None = None,
    hidden_size: int | None = None,
    device: str = "cpu",
    multiple_of: int = 1,
    joins: Mapping[str, Join] | None = None,
    spans: bool = False,
    counts_copies: bool = False,
    restarts: bool = False,
    in_few_shapes: Callable[[int], bool] | None = None,
) -> Batch:
    """Lay out one micro-batch in the named layout ("padded", "packed", "shared").

    `capacity` is the number of tokens per row in the packed and shared layouts, raised to the longest example if that is longer.
    Without it, the row width is the cheapest for a model of `hidden_size` on `device`: see `cheapest_rows`. Completions are
    numbered in the order of `examples`. The width of the grid is a multiple of `multiple_of`. `joins` says, by name, how the
    examples' inputs are joined: see `trl.data.inputs.joined`.

    Position ids are `[B,T]`. If an example has three-dimensional ones, they are `[3,B,T]`, and in the packed layout `[4,B,T]`:
    the first of the four are plain text positions, by which models recognise where a sequence ends.

    With `counts_copies`, `Batch.copies` is filled in. With `restarts`, the position ids of padding restart at 0 even where
    nothing has to be masked, so that the length of a sequence can be read from them.

    With `spans`, packed and shared batches have arguments for variable-length attention (`Batch.spans`), unless some tokens
    attend to later ones. If there is a single row, `in_few_shapes(n)` decides whether it is padded to n positions, one of few
    sizes, so that CUDA graphs can be reused.

    Raises ConfigError for an unknown layout, and DataError for per-token inputs with a wrong number of values.
    """
    if layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, LAYOUTS))
    check_inputs(examples, joins or {})
    placed = LAYOUTS[layout](examples)
    tokens = [example.tokens for example in placed]
    rows = [[i] for i in range(len(placed))] if layout == "padded" else rows_of(tokens, capacity, hidden_size, device)
    ahead = any(_sees_ahead(example, joins or {}) for example in examples)
    has_spans = spans and layout != "padded" and not ahead
    width = max(sum(tokens[i] for i in row) for row in rows)
    few = few_sizes(width + (layout == "shared"))  # `shared` needs at least one position of padding for surplus keys
    few += -few % multiple_of
    is_few = in_few_shapes is not None and has_spans and len(rows) == 1 and in_few_shapes(few)
    grid = _Grid(placed, rows, pad_token_id, few if is_few else width + -width % multiple_of)
    inputs = {"input_ids": grid.ids, "position_ids": grid.positions if grid.axes is None else grid.axes}
    if layout == "padded":
        inputs["attention_mask"] = (grid.sequence != PADDING).astype(np.int64)
    elif layout == "packed":
        inputs["position_ids"] = _packed_positions(grid, alone=not (restarts or is_few) and len(rows) == len(placed))
    segments = None
    if layout == "shared" or (layout == "packed" and ahead):
        segments = Segments(*map(torch.from_numpy, (grid.sequence, grid.branch, grid.positions)))
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    order = [i for row in rows for i in row]
    tensors |= joined([placed[i] for i in order], joins or {}, [grid.start[i] for i in order], grid.ids.shape)
    batch = _batch(examples, tensors, grid.before, grid.first, segments, tokens)
    if has_spans:
        batch = replace(batch, spans=spans_of(grid.sequence, grid.branch * (layout == "shared"), is_few))
    return replace(batch, copies=torch.from_numpy(_copies(grid, placed))) if counts_copies else batch


def _copies(grid: _Grid, placed: Sequence[Example]) -> np.ndarray:
    """How many rows of the padded layout a position stands for, `[B,T]`: 0 for padding, 1 for a token of a completion, the
    number of completions for a token of a prompt."""
    shared = np.array([len(example.completions) for example in placed])
    return np.where(grid.sequence == PADDING, 0, np.where(grid.branch == 0, shared[np.maximum(grid.sequence, 0)], 1))


def few_sizes(size: int) -> int:
    """`size` rounded up to one of few sizes: multiples of 64, and from 1,024 on eight sizes per power of two, so that at most
    an eighth is padding."""
    step = max(64, 1 << max(0, (size - 1).bit_length() - 4))
    return -(-size // step) * step


def spans_of(sequence: np.ndarray, branch: np.ndarray, is_few: bool = False) -> Spans:
    """Runs of queries and their keys, from sequence and branch `[B,T]`: a prompt and each of its branches is one run.

    With `is_few`, the number of runs is rounded up to a power of two and the number of keys to one of few sizes, by splitting
    the last run, which is padding.
    """
    rows = np.repeat(np.arange(len(sequence)), sequence.shape[1])
    flat = np.stack([rows, sequence.ravel(), branch.ravel()])
    starts = np.flatnonzero(np.r_[True, (flat[:, 1:] != flat[:, :-1]).any(0)])
    lengths = np.diff(np.r_[starts, flat.shape[1]])
    row, owner, part = flat[:, starts]
    trunk: dict[tuple[int, int], int] = {
        (r, o): i for i, (r, o, p) in enumerate(zip(row, owner, part, strict=True)) if not p
    }
    pieces = [
        [trunk[r, o], i] if p and (r, o) in trunk else [i]
        for i, (r, o, p) in enumerate(zip(row, owner, part, strict=True))
    ]
    seen = np.array([sum(lengths[i] for i in piece) for piece in pieces])
    keys = None
    if part.any():
        keys = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for p in pieces for i in p])
    if is_few:
        lengths, seen, keys = _filled_up(lengths, seen, keys, is_padded=sequence[-1, -1] == PADDING)
    query_starts, key_starts = (torch.from_numpy(np.r_[0, x.cumsum()].astype(np.int32)) for x in (lengths, seen))
    least = LONGEST if is_few else 1
    longest = (
        max(least, 1 << int(n.max() - 1).bit_length()) for n in (lengths, seen)
    )  # few values: constants of graphs
    return Spans(query_starts, key_starts, None if keys is None else torch.from_numpy(keys), *longest)


def _filled_up(
    lengths: np.ndarray, seen: np.ndarray, keys: np.ndarray | None, *, is_padded: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Lengths of runs, numbers of keys per run, and keys, padded to a number of runs that is a power of two.

    The last run, if it is padding, is split into runs that are no longer than the others; further runs are empty. Surplus keys
    all point to the last position.
    """
    own, others = (x[: len(x) - is_padded].tolist() for x in (lengths, seen))
    padding = int(lengths[-1]) if is_padded else 0
    more = 0 if keys is None else few_sizes(len(keys)) - len(keys)
    least = max(-(-padding // max(own)), -(-(padding + more) // max(others)))
    count = max(8, 1 << (len(own) + least - 1).bit_length()) - len(own)
    queries, extra = (np.diff(np.arange(count + 1) * n // max(count, 1)) for n in (padding, more))
    if keys is not None:
        before, ends = len(keys) - padding, queries.cumsum()
        cut, fill = np.split(keys[before:], ends[:-1]), (np.full(n, keys[-1]) for n in extra)
        keys = np.concatenate([keys[:before], *(x for pair in zip(fill, cut, strict=True) for x in pair)])
    return np.r_[own, queries], np.r_[others, queries + extra], keys


def _sees_ahead(example: Example, joins: Mapping[str, Join]) -> bool:
    """True if tokens of the example attend to later tokens, so that the model needs an explicit attention mask."""
    own = (joins.get(name) for name in example.inputs)
    return any(isinstance(join, PerToken) and join.sees_ahead for join in own)


def _packed_positions(grid: _Grid, *, alone: bool) -> np.ndarray:
    """Position ids `[B,T]` or `[4,B,T]` of the packed layout.

    If every row has a single sequence (`alone`), text positions do not restart in the padding, which tells the model that no
    mask is needed: padding comes last, and no token attends to it.
    """
    text = np.broadcast_to(np.arange(grid.ids.shape[1]), grid.ids.shape).copy() if alone else grid.positions
    if grid.axes is None:
        return text
    return grid.axes if grid.axes.ndim == 2 else np.concatenate([text[None], grid.axes])


def lay_out_encoder_decoder(examples: Sequence[Example], *, pad_token_id: int, decoder_start_token_id: int) -> Batch:
    """Lay out one micro-batch for an encoder-decoder: `input_ids [E,P]` once per example, `decoder_input_ids [N,C]`.

    The encoder's output is repeated by `Batch.example` inside the forward pass. `position` equals `predictor`, since the
    decoder inputs are shifted by one position and never include the last token.

    Raises DataError for examples with further model inputs.
    """
    if any(example.inputs for example in examples):
        names = sorted({name for example in examples for name in example.inputs})
        raise DataError(f"Encoder-decoders take token ids only, but these rows have inputs {names}: remove them.")
    prompts = _pad([example.prompt for example in examples], pad_token_id)
    completions = [completion for example in examples for completion in example.completions]
    decoder = _pad([[decoder_start_token_id, *completion.ids[:-1]] for completion in completions], pad_token_id)
    inputs = {
        "input_ids": torch.from_numpy(prompts),
        "attention_mask": _present([len(example.prompt) for example in examples], prompts.shape[1]),
        "decoder_input_ids": torch.from_numpy(decoder),
        "decoder_attention_mask": _present([len(completion) for completion in completions], decoder.shape[1]),
    }
    before = np.arange(len(completions)) * decoder.shape[1]
    batch = _batch(examples, inputs, before, before + 1, None, [example.tokens for example in examples])
    return replace(batch, position=batch.predictor, last=(batch.last - 1).clamp(min=0))


def _single(examples: Sequence[Example]) -> list[Example]:
    """One example per completion, with the prompt repeated."""
    return [replace(example, completions=(completion,)) for example in examples for completion in example.completions]


LAYOUTS: dict[str, Callable[[Sequence[Example]], list[Example]]] = {
    "padded": _single,
    "packed": _single,
    "shared": list,
}
"""For each layout, a function from the examples of a micro-batch to those that are placed in rows."""


class _Grid:
    """Token ids, text positions, sequences and branches `[B,T]` of the placed examples, and their start indices.

    `start[i]` is the flat index at which example i begins, `before[n]` that of the token before completion n (−1 if there is
    none), and `first[n]` that of its first token. `axes` are position ids `[B,T]` or `[3,B,T]` where examples have their own,
    else None.
    """

    def __init__(self, examples: list[Example], rows: list[list[int]], pad_token_id: int, width: int) -> None:
        shape = (len(rows), width)
        self.ids = np.full(shape, pad_token_id, dtype=np.int64)
        self.positions = np.zeros(shape, dtype=np.int64)
        self.sequence = np.full(shape, PADDING, dtype=np.int32)
        self.branch = np.zeros(shape, dtype=np.int32)
        self.start = [0] * len(examples)
        *numbers, completions = accumulate((len(example.completions) for example in examples), initial=0)
        self.before = np.full(completions, -1)
        self.first = np.zeros(completions, dtype=np.int64)
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                self.start[i] = r * width + at
                self._place(r, at, i, examples[i], numbers[i])
                at += examples[i].tokens
        self.axes = self._axes(examples)

    def _place(self, row: int, start: int, number: int, example: Example, first: int) -> None:
        prompt = len(example.prompt)
        origin = row * self.ids.shape[1]
        self.ids[row, start : start + prompt] = example.prompt
        self.positions[row, start : start + prompt] = np.arange(prompt)
        self.sequence[row, start : start + example.tokens] = number
        at = start + prompt
        for branch, completion in enumerate(example.completions, start=1):
            n = first + branch - 1
            end = at + len(completion)
            self.ids[row, at:end] = completion.ids
            self.positions[row, at:end] = np.arange(prompt, prompt + len(completion))
            self.branch[row, at:end] = branch
            self.first[n] = origin + at
            if prompt:
                self.before[n] = origin + start + prompt - 1
            at = end

    def _axes(self, examples: list[Example]) -> np.ndarray | None:
        """Position ids of the grid if any example has its own: those are filled in, and later tokens count on from them."""
        own = {i: np.asarray(e.positions) for i, e in enumerate(examples) if e.positions is not None}
        if not own:
            return None
        axes = self.positions.copy()
        if any(positions.ndim == 2 for positions in own.values()):
            axes = np.repeat(axes[None], 3, axis=0)
        flat = axes.reshape(*axes.shape[:-2], -1)
        for i, positions in own.items():
            start, end = self.start[i], self.start[i] + examples[i].tokens
            covered = min(positions.shape[-1], examples[i].tokens)
            following = examples[i].next_position
            following = positions.shape[-1] if following is None else following
            flat[..., start:end] += following - positions.shape[-1]
            flat[..., start : start + covered] = positions[..., :covered]
        return axes


def _batch(
    examples: Sequence[Example],
    inputs: dict[str, Tensor],
    before: np.ndarray,
    first: np.ndarray,
    segments: Segments | None,
    sizes: list[int],
) -> Batch:
    completions = [completion for example in examples for completion in example.completions]
    lengths = np.array([len(completion) for completion in completions])
    step = np.arange(max(lengths.max(), 1))
    inside = step < lengths[:, None]
    position = np.where(inside, first[:, None] + step, 0)
    predictor = np.maximum(position - 1, 0)
    predictor[:, 0] = np.where(inside[:, 0], np.maximum(before, 0), 0)
    mask = completion_masks(completions, len(step))
    mask[before < 0, 0] = 0
    owner = np.repeat(np.arange(len(examples)), [len(example.completions) for example in examples])
    last = np.where(lengths > 0, first + lengths - 1, np.maximum(before, 0))
    return Batch(
        inputs=inputs,
        predictor=torch.from_numpy(predictor),
        position=torch.from_numpy(position),
        target=torch.from_numpy(_pad([completion.ids for completion in completions], 0)),
        mask=torch.from_numpy(mask),
        scored=torch.from_numpy(np.flatnonzero(mask)),
        last=torch.from_numpy(last),
        example=torch.from_numpy(owner),
        signals=completion_signals(completions, len(step)),
        segments=segments,
        tokens=sum(sizes),
    )


def completion_masks(completions: Sequence[Completion], width: int) -> np.ndarray:
    """Masks `[N,width]` float32 of the completions: 1 for scored tokens."""
    mask = np.zeros((len(completions), width), dtype=np.float32)
    for row, completion in zip(mask, completions, strict=True):
        row[: len(completion)] = 1 if completion.mask is None else completion.mask
    return mask


def _pad(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    padded = np.full((len(rows), max(1, *map(len, rows)) if rows else 1), value, dtype=np.int64)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return padded


def _present(lengths: Sequence[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def completion_signals(completions: Sequence[Completion], width: int) -> dict[str, Tensor]:
    """Signals by name: `[N]`, or `[N,C]` if given per token; NaN for completions without the signal."""
    names = dict.fromkeys(name for completion in completions for name in completion.signals)
    return {name: _signal([c.signals.get(name, float("nan")) for c in completions], width) for name in names}


def _signal(values: list, width: int) -> Tensor:
    if all(isinstance(value, (int, float)) for value in values):
        return torch.tensor(values, dtype=torch.float32)
    table = np.zeros((len(values), width), dtype=np.float32)
    for row, value in zip(table, values, strict=True):
        row[: len(value) if isinstance(value, Sequence) else width] = value
    return torch.from_numpy(table)
