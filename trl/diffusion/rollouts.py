"""A rollout batch of pictures: what was sampled for which prompt, from which noise, and what it was rewarded with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trl.diffusion.trajectories import Trajectories
from trl.rollouts.sampling import stream as random_stream

Row = Mapping[str, Any]

IN_TRAINING, IN_EVALUATION, IN_ORDER = 0, 1, 2
"""Streams of random numbers: of pictures that are trained on, of those of evaluation, and of how a rollout batch is gone through."""


@dataclass(frozen=True)
class PictureRollouts:
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


def state_of_items(minibatches: Sequence[Sequence[Any]]) -> list[list[dict[str, Any]]]:
    """Minibatches of items as dicts of what their fields hold, for a checkpoint."""
    return [[{f.name: getattr(item, f.name) for f in fields(item)} for item in each] for each in minibatches]


def items_from(kind: type, state: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    """Minibatches of items of the class `kind`, from what `state_of_items` gave."""
    return [[kind(**item) for item in each] for each in state]


def split_pictures(items: Sequence[Sequence[Any]], count: int, *, seed: int) -> list[list[Any]]:
    """Items of pictures, in a random order of the pictures, as `count` minibatches of like many pictures."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [[item for i in order[start:end] for item in items[i]] for start, end in pairwise(bounds)]
