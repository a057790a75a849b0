"""The accumulation window: which sequences share a micro-batch, and what each token weighs.

An optimizer step sees the sequences of all its micro-batches, on all processes: the window. Its loss is

    loss = Σ weight · loss,       Σ weight = 1 over the window

so the gradient depends on the sequences in the window and not on how they were split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trl.types import StepBatch


@dataclass(frozen=True)
class NextWindow:
    """What the loader `source` gave beforehand, and how it is laid out."""

    source: Iterator[Any]
    items: list[Any]
    slots: int
    groups: list[list[int]]
    batches: list[Any]


class LossTerm(ABC):
    """A loss of whole steps that is added to those of their items: each micro-batch adds its part."""

    @abstractmethod
    def begin_step(self, batches: Sequence[Any]) -> None:
        """Take note of the micro-batches of a step, on the host, before any of them is trained on."""

    @abstractmethod
    def recording(self) -> AbstractContextManager[Any]:
        """What the loss of items is computed in; gives what `loss` reads."""

    @abstractmethod
    def loss(self, recorded: Any, batch: Any) -> Tensor:
        """The part of `batch`, a scalar, times the processes, over which gradients are averaged."""


def plan_micro_batches(sizes: Sequence[int], *, count: int, token_budget: int | None = None) -> list[list[int]]:
    """Split the sequences of a window, `sizes` tokens each, into at least `count` micro-batches of like lengths.

    With a budget, micro-batches are opened as needed so that none holds more than `token_budget` tokens when padded to
    its longest sequence (a longer sequence is alone in its own). Longest first: running out of memory happens early.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if token_budget is None:
        return _even(order, count)
    groups: list[list[int]] = []
    for i in order:
        if not groups or (len(groups[-1]) + 1) * sizes[groups[-1][0]] > token_budget:
            groups.append([])
        groups[-1].append(i)
    return groups if len(groups) >= count else _even(order, count)


def _even(order: list[int], count: int) -> list[list[int]]:
    """Consecutive parts whose numbers of sequences differ by at most one, none empty."""
    count = min(count, len(order))
    bounds = [len(order) * k // max(count, 1) for k in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def split_into_slots(batches: Sequence[StepBatch], slots: int) -> list[list[StepBatch]]:
    """Deal micro-batches to the `slots` that the training loop counts, in order; each has at least one."""
    return [[batches[i] for i in part] for part in _even(list(range(len(batches))), slots)]


def with_statistics(batches: Sequence[StepBatch], statistics: Mapping[str, Tensor]) -> list[StepBatch]:
    """The batches with scalars of the whole window as signals `[N]`."""
    if not statistics:
        return list(batches)
    return [
        replace(b, signals={**b.signals, **{name: value.expand(len(b.mask)) for name, value in statistics.items()}})
        for b in batches
    ]


def dummy_batch(batch: StepBatch) -> StepBatch:
    """A batch that takes part in forward and backward and changes nothing: every process has to take part equally."""
    return replace(batch.masked_out(), weight=batch.weight * 0, tokens=0)


def normalize_weights(
    batches: Sequence[StepBatch],
    weights: Callable[[StepBatch], Tensor],
    sum_over_processes: Callable[[Tensor], Tensor],
) -> tuple[list[StepBatch], int]:
    """The batches with `weight` filled in so that the weights of the window sum to 1, and the window's tokens.

    `weights(batch)` are unnormalised. `sum_over_processes` is called once, with a vector.
    """
    raw = [weights(batch) for batch in batches]
    local = torch.tensor([sum(w.sum().item() for w in raw), sum(b.tokens for b in batches)], dtype=torch.float64)
    whole, tokens = sum_over_processes(local).tolist()
    whole = max(whole, 1e-8)
    return [replace(batch, weight=w / whole) for batch, w in zip(batches, raw, strict=True)], int(tokens)
