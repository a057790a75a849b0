"""Layouts: how the sequences of a micro-batch lie in the B·T grid of one forward pass.

padded   one row per completion, its prompt repeated
packed   several sequences in a row, positions restart, none sees another
shared   each prompt once, its K completions branch off it: every completion sees the prompt and itself

All three give the same log-probabilities and gradients; they differ in work. All three are one construction: examples
(a prompt and the completions that hang from it) are placed in rows. `padded` and `packed` cut every example into examples
with one completion; `padded` gives each a row of its own.

    2 completions            p0 p1 p2 | a0 a1 | b0 b1 b2      positions  0 1 2 | 3 4 | 3 4 5
    predictor of a           p2 a0                            predictor of b   p2 b0 b1

The predictor of a completion's first token is the prompt's last token; a completion without a prompt has none, so its
first token is not scored. In an encoder-decoder the prompt goes to the encoder, once per example, and the decoder's
start token predicts the first token.

What the model reads beside tokens (pixels, token types, …) goes with the prompt, as `trl.data.inputs` joins it: once where
the prompt is shared, repeated where the prompt is.
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
"""Tokens that attention is told a run may have, at least, where shapes are to be few: more cost it nothing to speak of."""


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
    """One micro-batch in the named layout ("padded", "packed", "shared").

    `capacity` is the number of tokens that a row of the packed and shared layouts may hold, at least the longest example.
    Without it, rows are as wide as is cheapest for a model of `hidden_size` on a `device`: see `cheapest_rows`. Completions are
    numbered in the order of `examples`. The width of the grid is a multiple of `multiple_of`. `joins` says how the
    examples' inputs are joined, by name: see `trl.data.inputs.joined`.

    Positions are `[B,T]`; where an example has three-dimensional ones `[3,B,T]`, and in the packed layout `[4,B,T]`, those
    of the text first, by which models recognise where a sequence ends.

    With `counts_copies`, batches say how many rows of the padded layout each position stands for. With `restarts`, positions
    of padding begin anew even where nothing has to be masked, so that they tell how long a sequence is.

    With `spans`, batches that are not padded say what attends to what for attention of variable length, unless tokens see
    others behind them. Then `in_few_shapes(n)` may say whether a single row, n positions if it is, is to have one of few shapes.

    Raises ConfigError for a layout that there is not, DataError for per-token inputs that are not one value per token.
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
    few = few_sizes(width + (layout == "shared"))  # there padding is what further keys are given to
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
    """`[B,T]`: 0 for padding, 1 for a completion's token, and for a prompt's as many as it has completions."""
    shared = np.array([max(1, len(example.completions)) for example in placed])
    return np.where(grid.sequence == PADDING, 0, np.where(grid.branch == 0, shared[np.maximum(grid.sequence, 0)], 1))


def few_sizes(size: int) -> int:
    """The next size of few: 64, 128, …, and from 1,024 on eight to each power of two, so that an eighth is filled up at most."""
    step = max(64, 1 << max(0, (size - 1).bit_length() - 4))
    return -(-size // step) * step


def spans_of(sequence: np.ndarray, branch: np.ndarray, is_few: bool = False) -> Spans:
    """Runs of queries and their keys from sequence and branch `[B,T]`: a prompt and its branches are runs of their own.

    If shapes are to be few (`is_few`), as many runs as a power of two, and keys in few sizes: the last run, padding, is cut.
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
    longest = (max(least, 1 << int(n.max() - 1).bit_length()) for n in (lengths, seen))  # few values: graphs hold them
    return Spans(query_starts, key_starts, None if keys is None else torch.from_numpy(keys), *longest)


def _filled_up(
    lengths: np.ndarray, seen: np.ndarray, keys: np.ndarray | None, *, is_padded: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Lengths of runs, keys that they see, and the keys, for as many runs as a power of two.

    The last run, if it is padding, is cut into runs no longer than others; further ones are empty. Where there have to be more keys,
    they are the last position.
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
    """Whether tokens of the example see others behind them, so that models have to be given masks."""
    own = (joins.get(name) for name in example.inputs)
    return any(isinstance(join, PerToken) and join.sees_ahead for join in own)


def _packed_positions(grid: _Grid, *, alone: bool) -> np.ndarray:
    """Positions `[B,T]` or `[4,B,T]` of the packed layout.

    Where every row holds one sequence `alone`, positions that never restart tell the model that nothing has to be masked:
    padding comes last, and nobody sees it.
    """
    text = np.broadcast_to(np.arange(grid.ids.shape[1]), grid.ids.shape).copy() if alone else grid.positions
    if grid.axes is None:
        return text
    return grid.axes if grid.axes.ndim == 2 else np.concatenate([text[None], grid.axes])


def lay_out_encoder_decoder(examples: Sequence[Example], *, pad_token_id: int, decoder_start_token_id: int) -> Batch:
    """One micro-batch of an encoder-decoder: `input_ids [E,P]` once per example, `decoder_input_ids [N,C]`.

    The encoder's output is repeated by `Batch.example` inside the forward pass. `position` is that of the
    predictor, since the decoder reads a token one position later, and the last one never.

    Raises DataError for examples with inputs beside their tokens.
    """
    if any(example.inputs for example in examples):
        names = sorted({name for example in examples for name in example.inputs})
        raise DataError(
            f"An encoder-decoder is given token ids alone, but these rows have inputs {names}: leave them out."
        )
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
    """An example for every completion, the prompt repeated."""
    return [replace(example, completions=(completion,)) for example in examples for completion in example.completions]


LAYOUTS: dict[str, Callable[[Sequence[Example]], list[Example]]] = {
    "padded": _single,
    "packed": _single,
    "shared": list,
}
"""What is placed in rows, completions in their order."""


class _Grid:
    """Token ids, positions in the text, sequences and branches `[B,T]`, and where everything begins.

    `start[i]` is the flat index where example i begins; `before[n]` that of the token before completion n, −1 if there is
    none; `first[n]` that of its first. `axes` are the positions that examples bring along, `[B,T]` or `[3,B,T]`, or None.
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
        """The grid's positions where examples have their own: those, and what counts on from them."""
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
    """`[N,width]` float32: 1 for the tokens of completions that are scored."""
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
    """Signals by name: `[N]`, or `[N,C]` where given per token. A completion without the signal has NaN."""
    names = dict.fromkeys(name for completion in completions for name in completion.signals)
    return {name: _signal([c.signals.get(name, float("nan")) for c in completions], width) for name in names}


def _signal(values: list, width: int) -> Tensor:
    if all(isinstance(value, (int, float)) for value in values):
        return torch.tensor(values, dtype=torch.float32)
    table = np.zeros((len(values), width), dtype=np.float32)
    for row, value in zip(table, values, strict=True):
        row[: len(value) if isinstance(value, Sequence) else width] = value
    return torch.from_numpy(table)
