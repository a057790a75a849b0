"""The rollout batches of a run, one minibatch after the other.

A rollout batch is sampled, with the current weights, when its first minibatch is requested. It is trained on for
`iterations` epochs, or fewer if the remaining ones are skipped. Checkpoints contain the position in the rollout batch and,
unless the batch is finished, its minibatches. If an optimizer step could not be completed, because the next rollout batch
failed to be sampled, its minibatches are taken back, are part of the checkpoint, and are served again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trl.rollouts.experience import minibatches_from, state_of
from trl.types import Example

Minibatch = list[Example]


class RolloutBuffer(IterableDataset):
    """Minibatches of rollout batches, one epoch over the prompts at a time.

    roll_out      samples a rollout batch and gives its minibatches
    minibatches   number of minibatches of a rollout batch
    iterations    epochs over each rollout batch
    per_epoch     rollout batches of an epoch over the prompts; None for a stream, which has no end
    state_of      gives minibatches as a checkpoint holds them, and `batch_from` reads what it gave
    """

    def __init__(
        self,
        roll_out: Callable[[], list[Minibatch]],
        *,
        minibatches: int,
        iterations: int,
        per_epoch: int | None,
        state_of: Callable[[Sequence[Any]], list[Any]] = state_of,
        batch_from: Callable[[Sequence[Any]], list[Any]] = minibatches_from,
    ) -> None:
        self.roll_out, self.state_of, self.batch_from = roll_out, state_of, batch_from
        self.minibatches, self.updates_per_batch = minibatches, minibatches * iterations
        self.per_epoch = per_epoch
        self.batch: list[Minibatch] = []
        self.position = 0
        self.served = 0
        self.of_step: list[Minibatch] = []
        self.taken_back: list[Minibatch] = []
        self.step_begins_batch = True

    def __len__(self) -> int:
        if self.per_epoch is None:
            raise TypeError("a stream of prompts has no length")
        return self.per_epoch * self.updates_per_batch

    def __iter__(self) -> Iterator[Minibatch]:
        """The minibatches of this epoch; empty ones for those that were trained on before a checkpoint, to be skipped."""
        done = self.served if self.per_epoch is None else self.served % len(self)
        for i in count() if self.per_epoch is None else range(len(self)):
            yield [] if i < done else self.next_minibatch()

    def begin_step(self) -> None:
        """Begin an optimizer step: minibatches served from now on belong to it."""
        self.of_step = []
        if not self.taken_back:
            self.step_begins_batch = self.is_new

    def take_back(self) -> None:
        """Take back the minibatches of the current optimizer step, to serve them again before any new ones."""
        self.served -= len(self.of_step)
        self.taken_back, self.of_step = [*self.of_step, *self.taken_back], []

    def next_minibatch(self) -> Minibatch:
        minibatch = self.taken_back.pop(0) if self.taken_back else self._following()
        self.served += 1
        self.of_step.append(minibatch)
        return minibatch

    def _following(self) -> Minibatch:
        update = self.position % self.updates_per_batch
        if update == 0:
            self.batch = self.roll_out()
        self.position += 1
        return self.batch[update % self.minibatches]

    @property
    def is_new(self) -> bool:
        """True if the next minibatch, apart from those served again, begins a new rollout batch."""
        return self.position % self.updates_per_batch == 0

    @property
    def is_between_epochs(self) -> bool:
        """Whether an epoch over the rollout batch has ended and another one follows."""
        return not self.is_new and self.position % self.minibatches == 0

    def skip_remaining_epochs(self) -> None:
        """The next minibatch is the first one of a new rollout batch."""
        self.position += -self.position % self.updates_per_batch

    def state(self) -> dict[str, Any]:
        batch = [] if self.is_new else self.state_of(self.batch)
        found = {"position": self.position, "served": self.served, "batch": batch}
        if self.taken_back:
            found |= {"taken_back": self.state_of(self.taken_back), "step_begins_batch": self.step_begins_batch}
        return found

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position, self.served, self.batch = state["position"], state["served"], self.batch_from(state["batch"])
        self.taken_back = self.batch_from(state.get("taken_back", []))
        self.step_begins_batch = state.get("step_begins_batch", True)

    def loader(self) -> DataLoader:
        """Minibatches one at a time. It reads nothing ahead: samples have to come from the weights of their moment.

        A generator of its own keeps the loader from drawing on the random state that training goes by.
        """
        return DataLoader(self, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())


def _as_it_is(each: Minibatch) -> Minibatch:
    return each
