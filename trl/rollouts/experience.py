"""A rollout batch: from groups of samples to the examples that are trained on, and back from a checkpoint.

    groups (G samples of a prompt, rewarded) ──▶ Experience [N,…] ──advantages──▶ examples with signals ──▶ minibatches

Experience is tensors over the whole rollout batch, for algorithms; examples are ragged lists, one prompt with those of its samples
that are learned from. A minibatch is what one counted step of the loop trains on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from trl.data.layout import completion_masks, completion_signals
from trl.rollouts.engine import Rollout
from trl.types import Completion, Example, Experience


@dataclass(frozen=True)
class Group:
    """All samples of one prompt, and their rewards.

    row           the dataset's row
    example       the prompt and its G completions, with the signal `sampler_logprobs`
    finished      [G] whether a completion came to its end
    completions   [G] as reward functions see them: texts or conversations
    rewards       [G,F] of every function, NaN where it did not apply
    failed        [G] whether a function failed
    extra         what reward functions logged of each completion, by name
    """

    row: Mapping[str, Any]
    example: Example
    finished: Tensor
    completions: Sequence[Any]
    rewards: Tensor
    failed: Tensor
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def empty_group(row: Mapping[str, Any], prompt: Example, n: int, *, functions: int) -> Group:
    """A group of `n` for a process without a prompt of its own: nothing is rewarded, learned from or counted."""
    completion = Completion([0], mask=[0], signals={"sampler_logprobs": [0.0]})
    yes = torch.ones(n, dtype=torch.bool)
    example = replace(prompt, completions=(completion,) * n)
    return Group(row, example, yes, [""] * n, torch.full((n, functions), torch.nan), failed=yes)


def example_of(prompt: Example, rollouts: Sequence[Rollout]) -> Example:
    """The prompt with its sampled completions."""
    completions = (Completion(r.ids, r.mask, {"sampler_logprobs": r.logprobs}) for r in rollouts)
    return replace(prompt, completions=tuple(completions))


def finished(rollouts: Sequence[Rollout]) -> Tensor:
    """`[G]` bool: whether completions came to their end, or were cut at the limit."""
    return torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])


def offsets(examples: Sequence[Example]) -> list[int]:
    """The number of each example's first completion."""
    return [0, *accumulate(len(example.completions) for example in examples)][:-1]


def completions_of(examples: Sequence[Example]) -> list[Completion]:
    return [completion for example in examples for completion in example.completions]


def experience_of(examples: Sequence[Example], rewards: Tensor) -> Experience:
    """The experience of a rollout batch: rewards `[N]` of its completions, and their signals as tensors."""
    completions = completions_of(examples)
    sizes = torch.tensor([len(example.completions) for example in examples])
    width = max(1, *map(len, completions))
    mask, signals = torch.from_numpy(completion_masks(completions, width)), completion_signals(completions, width)
    return Experience(rewards, torch.arange(len(examples)).repeat_interleave(sizes), mask, signals)


def tables_of(
    examples: Sequence[Example], parts: Iterable[tuple[Sequence[int], Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """Numbers `[N,C]` of all completions by name, from `[n,c]` of parts, each with the indices of its examples."""
    first = offsets(examples)
    shape = (len(completions_of(examples)), max(1, *(len(c) for c in completions_of(examples))))
    tables: dict[str, Tensor] = {}
    for part, found in parts:
        rows = torch.tensor([first[i] + j for i in part for j in range(len(examples[i].completions))])
        for name, values in found.items():
            table = tables.setdefault(name, torch.zeros(shape))
            table[rows, : values.shape[1]] = values.float().cpu()
    return tables


def with_signals(examples: Sequence[Example], signals: Mapping[str, Tensor]) -> list[Example]:
    """The examples with signals `[N]` or `[N,C]` added to those of their completions."""
    rows = {name: values.tolist() for name, values in signals.items()}
    made, n = [], 0
    for example in examples:
        completions = []
        for completion in example.completions:
            added = {k: v[n][: len(completion)] if isinstance(v[n], list) else v[n] for k, v in rows.items()}
            completions.append(replace(completion, signals={**completion.signals, **added}))
            n += 1
        made.append(replace(example, completions=tuple(completions)))
    return made


def without_signals(examples: Sequence[Example], names: Sequence[str]) -> list[Example]:
    """The examples less the named signals."""

    def less(completion: Completion) -> Completion:
        return replace(completion, signals={k: v for k, v in completion.signals.items() if k not in names})

    return [replace(e, completions=tuple(map(less, e.completions))) for e in examples]


def split_into_minibatches(
    examples: Sequence[Example], keep: Sequence[bool], minibatches: int, budget: int | None
) -> list[list[Example]]:
    """The completions to keep, in as many minibatches of like numbers of completions; groups stay together as far as they can.

    A group is split where it crosses the end of a minibatch, or holds more than `budget` tokens with its prompt. Where there
    are fewer completions than minibatches, one that nothing is learned from fills the rest.
    """
    wanted = iter(keep)
    flat = [(i, c) for i, example in enumerate(examples) for c in example.completions if next(wanted)]
    flat += [(0, masked_out(examples[0]).completions[0])] * (minibatches - len(flat))
    bounds = [len(flat) * k // minibatches for k in range(minibatches + 1)]
    return [_grouped(examples, flat[a:b], budget) for a, b in pairwise(bounds)]


def masked_out(example: Example) -> Example:
    """The example, with nothing in it to learn from."""
    return replace(example, completions=tuple(replace(c, mask=[0] * len(c)) for c in example.completions))


def deal_minibatches(examples: Sequence[Example], padding_example: Example, minibatches: int) -> list[list[Example]]:
    """Examples that are to stay whole, in minibatches of like numbers; `padding_example`, masked_out, where there are too few."""
    whole = [*examples, *[masked_out(padding_example)] * (minibatches - len(examples))]
    bounds = [len(whole) * k // minibatches for k in range(minibatches + 1)]
    return [whole[a:b] for a, b in pairwise(bounds)]


def _grouped(examples: Sequence[Example], flat: Sequence[tuple[int, Completion]], budget: int | None) -> list[Example]:
    """Neighbours with the same prompt as one example, of at most `budget` tokens."""
    pieces: list[tuple[int, list[Completion], int]] = []
    for i, completion in flat:
        prompt = len(examples[i].prompt)
        if pieces and pieces[-1][0] == i and (budget is None or pieces[-1][2] + len(completion) <= budget):
            index, completions, tokens = pieces[-1]
            pieces[-1] = (index, [*completions, completion], tokens + len(completion))
        else:
            pieces.append((i, [completion], prompt + len(completion)))
    return [replace(examples[i], completions=tuple(completions)) for i, completions, _ in pieces]


def state_of(minibatches: Sequence[Sequence[Example]]) -> list[list[dict[str, Any]]]:
    """Minibatches as lists, dicts and numbers, for a checkpoint."""

    def plain(c: Completion) -> dict[str, Any]:
        return {"ids": list(c.ids), "mask": None if c.mask is None else list(c.mask), "signals": dict(c.signals)}

    def whole(e: Example) -> dict[str, Any]:
        positions = None if e.positions is None else torch.as_tensor(e.positions)
        prompt = {"prompt": list(e.prompt), "positions": positions, "next_position": e.next_position}
        return {**prompt, "inputs": dict(e.inputs), "completions": [plain(c) for c in e.completions]}

    return [[whole(example) for example in each] for each in minibatches]


def minibatches_from(state: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Example]]:
    """Minibatches from what `state_of` gave."""
    return [
        [Example(**{**e, "completions": tuple(Completion(**c) for c in e["completions"])}) for e in each]
        for each in state
    ]
