"""A rollout batch of pictures: what was sampled for which prompt, from which noise, and what it was rewarded with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trl.diffusion.trajectories import Trajectories, Transition
from trl.rollouts.buffer import RolloutBuffer
from trl.rollouts.sampling import stream as random_stream

Row = Mapping[str, Any]

IN_TRAINING, IN_EVALUATION, IN_ORDER = 0, 1, 2
"""Streams of random numbers: of pictures that are trained on, of those of evaluation, and of how a rollout batch is gone through."""


@dataclass(frozen=True)
class PictureBatch:
    """N pictures on the host, K of each row, one row after the other.

    rows          what they were sampled for, one for each picture
    group         [N] which prompt's group a picture belongs to
    trajectories  how they were made
    images        [N,3,H,W] in [0, 1]
    values        [N,F] rewards of every function, NaN where it did not apply
    rewards       [N] one reward each
    """

    rows: Sequence[Row]
    group: Tensor
    trajectories: Trajectories
    images: Tensor
    values: Tensor
    rewards: Tensor

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]


def seed_of(base: int, stream: int, number: int) -> int:
    """The seed of picture `number` of a run: another one for every picture, run and stream (training, evaluation).

    Its low 32 bits depend on all three, since torch's generator on the CPU looks at no others.
    """
    return int(random_stream(base, torch.tensor([stream]), torch.tensor([number]))) % 2**62


class PictureBuffer(RolloutBuffer):
    """Minibatches of items of pictures; `state_of` and `items_of` write and read the items of a minibatch."""

    def __init__(
        self,
        roll_out: Callable[[], list[list[Any]]],
        *,
        minibatches: int,
        iterations: int,
        per_epoch: int | None,
        state_of: Callable[[Sequence[Any]], dict[str, Any]],
        items_of: Callable[[Mapping[str, Any]], list[Any]],
    ) -> None:
        super().__init__(roll_out, minibatches=minibatches, iterations=iterations, per_epoch=per_epoch)
        self.state_of, self.items_of = state_of, items_of

    def state_dict(self) -> dict[str, Any]:
        batch = [] if self.is_new else [self.state_of(items) for items in self.batch]
        return {"position": self.position, "served": self.served, "batch": batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self.served = state["position"], state["served"]
        self.batch = [self.items_of(each) for each in state["batch"]]


def state_of_transitions(items: Sequence[Transition]) -> dict[str, Any]:
    """Transitions as tensors and lists, which a checkpoint can hold."""
    if not items:
        return {}
    return {
        "latents": torch.stack([each.latents for each in items]),
        "following": torch.stack([each.following for each in items]),
        "step": [each.step for each in items],
        "prompt": [each.prompt for each in items],
        "signals": {name: [each.signals[name] for each in items] for name in items[0].signals},
    }


def transitions_from(state: Mapping[str, Any]) -> list[Transition]:
    """What `state_of_transitions` wrote."""
    if not state:
        return []
    signals = state["signals"]
    parts = (state["latents"], state["following"], state["step"], state["prompt"])
    return [
        Transition(*each, {name: values[i] for name, values in signals.items()})
        for i, each in enumerate(zip(*parts, strict=True))
    ]


def split_pictures(items: Sequence[Sequence[Any]], count: int, *, seed: int) -> list[list[Any]]:
    """Items of pictures, in a random order of the pictures, as `count` minibatches of like many pictures."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [[item for i in order[start:end] for item in items[i]] for start, end in pairwise(bounds)]
