"""The rollout buffer: an iterator over the minibatches of one rollout batch after the other.

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
    """Iterates over the minibatches of one epoch over the prompts.

    roll_out      samples a rollout batch and returns its minibatches
    minibatches   number of minibatches in a rollout batch
    iterations    epochs over each rollout batch
    per_epoch     number of rollout batches in an epoch over the prompts; None for a stream without end
    state_of      converts minibatches to the form in which checkpoints store them; `batch_from` is its inverse
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
        """Yield the minibatches of this epoch. Those trained on before a resumed checkpoint are empty, to be skipped."""
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
        """True if an epoch over the rollout batch has just ended and another epoch over it follows."""
        return not self.is_new and self.position % self.minibatches == 0

    def skip_remaining_epochs(self) -> None:
        """Make the next minibatch the first one of a new rollout batch."""
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
        """A data loader that yields one minibatch at a time.

        It does not prefetch, since a rollout batch has to be sampled with the weights of the step that trains on it. It has
        its own random generator, so that it does not advance the random state of training.
        """
        return DataLoader(self, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())


def _as_it_is(each: Minibatch) -> Minibatch:
    return each
