"""A rollout batch of pictures: prompts, trajectories, pictures and rewards."""

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
"""Streams of random numbers: for sampling in training, for sampling in evaluation, and for the order of minibatches."""


@dataclass(frozen=True)
class PictureRollouts:
    """N pictures on the host: K for each row, in the order of rows.

    rows          the dataset row of each picture
    group         [N] index of the group (prompt) of each picture
    trajectories  their denoising trajectories
    images        [N,3,H,W] in [0, 1]
    values        [N,F] reward of each function, NaN where it did not apply
    rewards       [N] combined reward
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
    """The seed of picture `number` of a run: different for every picture, run (`base`) and stream (training, evaluation).

    Its low 32 bits depend on all three, since torch's CPU generator uses only those.
    """
    return int(random_stream(base, torch.tensor([stream]), torch.tensor([number]))) % 2**62


def state_of_items(minibatches: Sequence[Sequence[Any]]) -> list[list[dict[str, Any]]]:
    """Convert minibatches of items to dicts of their fields, for a checkpoint."""
    return [[{f.name: getattr(item, f.name) for f in fields(item)} for item in each] for each in minibatches]


def items_from(kind: type, state: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    """Restore minibatches of items of the class `kind` from the result of `state_of_items`."""
    return [[kind(**item) for item in each] for each in state]


def split_pictures(items: Sequence[Sequence[Any]], count: int, *, seed: int) -> list[list[Any]]:
    """Shuffle pictures (each a list of items) and split them into `count` minibatches with about equally many pictures."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [[item for i in order[start:end] for item in items[i]] for start, end in pairwise(bounds)]
