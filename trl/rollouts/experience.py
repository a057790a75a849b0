"""Conversions of a rollout batch: groups of samples to an `Experience`, to examples to train on, and to and from checkpoints.

    groups (G samples of a prompt, with rewards) ──▶ Experience [N,…] ──advantages──▶ examples with signals ──▶ minibatches

An `Experience` holds tensors over the whole rollout batch, for algorithms. Examples are ragged lists: a prompt with those of
its samples that are trained on. A minibatch is what one iteration of the training loop is given.
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

    row           row of the dataset that the prompt comes from
    example       the prompt and its G completions, with the signal `sampler_logprobs`
    finished      [G] bool: the completion ended by itself, not at the token limit
    completions   [G] as passed to reward functions: texts or conversations
    rewards       [G,F] reward of each of F functions, NaN where a function did not apply
    failed        [G] bool: a reward function failed
    extra         values that reward functions logged, one per completion, by name
    """

    row: Mapping[str, Any]
    example: Example
    finished: Tensor
    completions: Sequence[Any]
    rewards: Tensor
    failed: Tensor
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def empty_group(row: Mapping[str, Any], prompt: Example, n: int, *, functions: int) -> Group:
    """A group of `n` dummy completions, for a process without a prompt: not rewarded, not trained on, not counted."""
    completion = Completion([0], mask=[0], signals={"sampler_logprobs": [0.0]})
    yes = torch.ones(n, dtype=torch.bool)
    example = replace(prompt, completions=(completion,) * n)
    return Group(row, example, yes, [""] * n, torch.full((n, functions), torch.nan), failed=yes)


def example_of(prompt: Example, rollouts: Sequence[Rollout]) -> Example:
    """The prompt with its sampled completions."""
    completions = (Completion(r.ids, r.mask, {"sampler_logprobs": r.logprobs}) for r in rollouts)
    return replace(prompt, completions=tuple(completions))


def finished(rollouts: Sequence[Rollout]) -> Tensor:
    """`[G]` bool: true where a completion ended by a stop token or stop string, false where it was cut at the limit."""
    return torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])


def offsets(examples: Sequence[Example]) -> list[int]:
    """The index of each example's first completion among all completions."""
    return [0, *accumulate(len(example.completions) for example in examples)][:-1]


def completions_of(examples: Sequence[Example]) -> list[Completion]:
    return [completion for example in examples for completion in example.completions]


def experience_of(examples: Sequence[Example], rewards: Tensor) -> Experience:
    """The experience of a rollout batch, from the rewards `[N]` of its completions and their signals, padded to tensors."""
    completions = completions_of(examples)
    sizes = torch.tensor([len(example.completions) for example in examples])
    width = max(1, *map(len, completions))
    mask, signals = torch.from_numpy(completion_masks(completions, width)), completion_signals(completions, width)
    return Experience(rewards, torch.arange(len(examples)).repeat_interleave(sizes), mask, signals)


def tables_of(
    examples: Sequence[Example], parts: Iterable[tuple[Sequence[int], Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """Combine values of parts of the examples to tables `[N,C]` over all completions, by name.

    Each part is a sequence of indices into `examples`, and values `[n,c]` of their completions by name.
    """
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
    """The examples with `signals` `[N]` or `[N,C]` added to the signals of their completions."""
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
    """The examples without the signals called `names`."""

    def less(completion: Completion) -> Completion:
        return replace(completion, signals={k: v for k, v in completion.signals.items() if k not in names})

    return [replace(e, completions=tuple(map(less, e.completions))) for e in examples]


def split_into_minibatches(
    examples: Sequence[Example], keep: Sequence[bool], minibatches: int, budget: int | None
) -> list[list[Example]]:
    """Split the completions to keep into `minibatches` parts with nearly equal numbers of completions.

    A group is split only where it crosses the end of a minibatch, or has more than `budget` tokens together with its prompt. If
    there are fewer completions than minibatches, the rest is filled with a masked-out completion.
    """
    wanted = iter(keep)
    flat = [(i, c) for i, example in enumerate(examples) for c in example.completions if next(wanted)]
    flat += [(0, masked_out(examples[0]).completions[0])] * (minibatches - len(flat))
    bounds = [len(flat) * k // minibatches for k in range(minibatches + 1)]
    return [_grouped(examples, flat[a:b], budget) for a, b in pairwise(bounds)]


def masked_out(example: Example) -> Example:
    """The example with no token scored, so that nothing is learned from it."""
    return replace(example, completions=tuple(replace(c, mask=[0] * len(c)) for c in example.completions))


def deal_minibatches(examples: Sequence[Example], padding_example: Example, minibatches: int) -> list[list[Example]]:
    """Split examples, each kept whole, into `minibatches` parts of nearly equal numbers.

    If there are fewer examples than minibatches, the rest is filled with `padding_example`, masked out.
    """
    whole = [*examples, *[masked_out(padding_example)] * (minibatches - len(examples))]
    bounds = [len(whole) * k // minibatches for k in range(minibatches + 1)]
    return [whole[a:b] for a, b in pairwise(bounds)]


def _grouped(examples: Sequence[Example], flat: Sequence[tuple[int, Completion]], budget: int | None) -> list[Example]:
    """Join neighbouring completions of the same prompt to one example of at most `budget` tokens."""
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
    """Minibatches as lists, dicts, numbers and tensors, as a checkpoint stores them."""

    def plain(c: Completion) -> dict[str, Any]:
        return {"ids": list(c.ids), "mask": None if c.mask is None else list(c.mask), "signals": dict(c.signals)}

    def whole(e: Example) -> dict[str, Any]:
        positions = None if e.positions is None else torch.as_tensor(e.positions)
        prompt = {"prompt": list(e.prompt), "positions": positions, "next_position": e.next_position}
        return {**prompt, "inputs": dict(e.inputs), "completions": [plain(c) for c in e.completions]}

    return [[whole(example) for example in each] for each in minibatches]


def minibatches_from(state: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Example]]:
    """Minibatches from the result of `state_of`."""
    return [
        [Example(**{**e, "completions": tuple(Completion(**c) for c in e["completions"])}) for e in each]
        for each in state
    ]
