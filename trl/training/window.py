"""The accumulation window: how sequences are split into micro-batches, and the weight of each token.

The window is all sequences of an optimizer step, over all micro-batches and processes. Its loss is

    loss = Σ weight · loss,       Σ weight = 1 over the window

so the gradient depends on the sequences in the window and not on how they were split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl.types import ListNotDict, StepBatch


@dataclass(frozen=True)
class NextWindow:
    """Items that were read in advance from the loader `source`, and their micro-batches."""

    source: Iterator[Any]
    items: list[Any]
    slots: int
    groups: list[list[int]]
    batches: list[Any]


class MicroBatches(ListNotDict):
    """The micro-batches of an accumulation step, which `training_step` gets."""

    no_dict: ClassVar[str] = (
        "The inputs of `training_step` are a list of micro-batches, not a dict of input_ids and labels. Each has `inputs`, the "
        "arguments of the model's forward, and `mask` [N,C], which is 1 for the tokens that are trained on."
    )


class LossTerm(ABC):
    """A loss of a whole step that is added to the losses of its items; each micro-batch contributes a part."""

    @abstractmethod
    def begin_step(self, batches: Sequence[Any]) -> None:
        """Called with the micro-batches of a step, on the host, before training on them."""

    @abstractmethod
    def recording(self) -> AbstractContextManager[Any]:
        """A context around the forward pass of the items' loss; yields what `loss` gets as `recorded`."""

    @abstractmethod
    def loss(self, recorded: Any, batch: Any) -> Tensor:
        """The part of `batch`, a scalar, times the number of processes, since gradients are averaged over them."""


def plan_micro_batches(sizes: Sequence[int], *, count: int, token_budget: int | None = None) -> list[list[int]]:
    """Split the sequences of a window, `sizes` tokens each, into at least `count` micro-batches of similar lengths.

    With a budget, there are as many micro-batches as needed so that none has more than `token_budget` tokens when padded to
    its longest sequence (a longer sequence gets its own). The longest come first, so that running out of memory happens early.
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
    """Split into `count` consecutive parts, none empty, whose sizes differ by at most one."""
    count = min(count, len(order))
    bounds = [len(order) * k // max(count, 1) for k in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def split_into_slots(batches: Sequence[StepBatch], slots: int) -> list[MicroBatches]:
    """Distribute micro-batches, in order, over the `slots` accumulation steps of the training loop; each gets at least one."""
    return [MicroBatches(batches[i] for i in part) for part in _even(list(range(len(batches))), slots)]


def with_statistics(batches: Sequence[StepBatch], statistics: Mapping[str, Tensor]) -> list[StepBatch]:
    """Add scalars of the whole window to the batches, as signals `[N]`."""
    if not statistics:
        return list(batches)
    return [
        replace(b, signals={**b.signals, **{name: value.expand(len(b.mask)) for name, value in statistics.items()}})
        for b in batches
    ]


def dummy_batch(batch: StepBatch) -> StepBatch:
    """A batch with weight 0: it runs forward and backward, which all processes must do equally often, but changes nothing."""
    return replace(batch.masked_out(), weight=batch.weight * 0, tokens=0)


def normalize_weights(
    batches: Sequence[StepBatch],
    weights: Callable[[StepBatch], Tensor],
    sum_over_processes: Callable[[Tensor], Tensor],
) -> tuple[list[StepBatch], int]:
    """Set `weight` of the batches such that the weights of the window sum to 1; return them and the window's number of tokens.

    `weights(batch)` gives unnormalised weights. `sum_over_processes` is called once, with a vector.
    """
    raw = [weights(batch) for batch in batches]
    local = torch.tensor([sum(w.sum().item() for w in raw), sum(b.tokens for b in batches)], dtype=torch.float64)
    whole, tokens = sum_over_processes(local).tolist()
    whole = max(whole, 1e-8)
    return [replace(batch, weight=w / whole) for batch, w in zip(batches, raw, strict=True)], int(tokens)
