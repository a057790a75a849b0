"""Rounds in the order in which they are trained on.

A round is rolled out when its first slice is asked for, with the weights of that moment, and gone through `iterations`
times, or fewer where the rest is given up: the next round then comes sooner. Where training stands is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trl.rollouts.experience import slices_from, state_of
from trl.types import Example

Slice = list[Example]


class Rounds(IterableDataset):
    """Slices of rounds, an epoch at a time.

    roll_out            makes the slices of a round
    slices, iterations  slices of a round, and how often they are gone through
    per_epoch           rounds of an epoch; None for a stream, which has no end
    """

    def __init__(
        self, roll_out: Callable[[], list[Slice]], *, slices: int, iterations: int, per_epoch: int | None
    ) -> None:
        self.roll_out = roll_out
        self.slices, self.turns = slices, slices * iterations
        self.per_epoch = per_epoch
        self.round: list[Slice] = []
        self.position = 0
        self.served = 0

    def __len__(self) -> int:
        if self.per_epoch is None:
            raise TypeError("a stream of prompts has no length")
        return self.per_epoch * self.turns

    def __iter__(self) -> Iterator[Slice]:
        """The slices of this epoch; empty ones for those that were trained on before a checkpoint, to be skipped."""
        done = self.served if self.per_epoch is None else self.served % len(self)
        for i in count() if self.per_epoch is None else range(len(self)):
            yield [] if i < done else self.next_slice()

    def next_slice(self) -> Slice:
        turn = self.position % self.turns
        if turn == 0:
            self.round = self.roll_out()
        self.position += 1
        self.served += 1
        return self.round[turn % self.slices]

    @property
    def is_fresh(self) -> bool:
        """Whether nothing has been learned from the samples of the next slice's round."""
        return self.position % self.turns == 0

    @property
    def is_between_epochs(self) -> bool:
        """Whether the round has been gone through at least once, and is about to be gone through again."""
        return not self.is_fresh and self.position % self.slices == 0

    def give_up(self) -> None:
        """Go on with a new round."""
        self.position += -self.position % self.turns

    def state(self) -> dict[str, Any]:
        round_ = [] if self.is_fresh else state_of(self.round)
        return {"position": self.position, "served": self.served, "round": round_}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position, self.served, self.round = state["position"], state["served"], slices_from(state["round"])

    def loader(self) -> DataLoader:
        """Slices one at a time. It reads nothing ahead: samples have to come from the weights of their moment.

        A generator of its own keeps the loader from drawing on the random state that training goes by.
        """
        return DataLoader(self, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())


def _as_it_is(each: Slice) -> Slice:
    return each
