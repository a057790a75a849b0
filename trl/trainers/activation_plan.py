"""Which layers are checkpointed where the options leave it open: as few as the heaviest step needs.

What a step takes besides weights is counted before the first one:

    gradients and the states of the optimizer      from the shapes of what is trained
    activations                                    what layers keep for backward, measured on a shorter micro-batch
    head                                           its two tiles of logits

and a share of it for holes between blocks of memory. See `trl.models.checkpointing` for what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import ceil, floor
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback

from trl.counts import counted, size_of
from trl.models.checkpointing import checkpointable_layers, kept_for_backward, layers_to_recompute
from trl.models.graphs import without_graphs
from trl.models.patching import training
from trl.models.score import unwrap
from trl.trainers.heaviest import LearnsFromRows, heaviest_window, shortened
from trl.training.optimizers import StateSizes
from trl.types import Batch, Example

HOLES = 1.2
"""Memory that a step takes for each byte that it uses: blocks do not fit into every hole that others leave."""
SHARES = (1 / 16, 1 / 8, 1 / 4)
"""Of the tokens of the heaviest micro-batch, those on which activations are measured."""
TILES = 192 * 2**20
"""Logits of a tile of the head in float32, and their gradient in half precision."""
WIDEST = 4
"""Bytes of a number of the residual stream, at most."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Options of models whose attention does not look further back."""


@dataclass(frozen=True)
class ActivationPlan:
    """`recomputed` of `layers` are checkpointed: keeping all takes `needed` bytes besides what is there, of `free` ones."""

    layers: int
    recomputed: int
    needed: int
    free: int

    @classmethod
    def of(cls, *, kept: int, saved: Sequence[float], free: int) -> ActivationPlan:
        """The plan where a step takes `kept` bytes besides what is there, and `saved[i]` less with layer i checkpointed."""
        count = layers_to_recompute(kept=kept, saved=saved, free=free / HOLES)
        return cls(len(saved), count, ceil(HOLES * kept), free)

    @classmethod
    def of_all(cls, model: nn.Module) -> ActivationPlan:
        """The plan that takes least memory."""
        layers = len(checkpointable_layers(model))
        return cls(layers, layers, 0, 0)

    def leaves(self, size: int) -> bool:
        """Whether `size` bytes more are free beside a step that keeps all activations."""
        return not self.recomputed and self.needed + HOLES * size <= self.free

    @property
    def what(self) -> str:
        """What becomes of activations."""
        if not self.recomputed:
            return f"kept by all {counted(self.layers, 'layer')}"
        which = "all" if self.recomputed == self.layers else f"{self.recomputed} of"
        return f"computed again in backward by {which} {counted(self.layers, 'layer')}"

    def __str__(self) -> str:
        return (
            f"Activations are {self.what} (gradient_checkpointing): with all of them a step takes {size_of(self.needed)} "
            f"besides the weights, and {size_of(self.free)} are free."
        )


class CheckpointFirstLayers(TrainerCallback):
    """Leaves the first `count` layers checkpointed, of all that `transformers` has before training begins."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        for layer in checkpointable_layers(model)[self.count :]:
            layer.gradient_checkpointing = False


class PlansActivations(LearnsFromRows, Protocol):
    """What is asked of a trainer."""

    model: Any
    accelerator: Any

    def plan(self, items: Sequence[Example], count: int) -> list[list[int]]: ...
    def collate(self, items: Sequence[Example]) -> Batch: ...
    def forward_pass(self, model: Any, batch: Batch) -> Any: ...


def plan_activations(trainer: PlansActivations, free: int) -> ActivationPlan:
    """The plan of a trainer that is about to train, with `free` bytes of its device."""
    examples = heaviest_micro_batch(trainer)
    positions = trainer.collate(examples).positions
    activations = activation_bytes(trainer, examples, positions)
    kept = trained_bytes(trainer) + TILES + sum(activations)
    start = positions * unwrap(trainer.model).config.get_text_config().hidden_size * WIDEST
    return ActivationPlan.of(kept=kept, saved=[layer - start for layer in activations[:-1]], free=free)


def heaviest_micro_batch(trainer: PlansActivations) -> list[Example]:
    """The examples of the largest micro-batch of the heaviest window."""
    window = heaviest_window(trainer)
    groups = trainer.plan(window, trainer.args.gradient_accumulation_steps)
    examples = ([window[i] for i in group] for group in groups)
    return max(examples, key=lambda some: trainer.collate(some).positions)


def trained_bytes(trainer: PlansActivations) -> int:
    """Gradients, states of the optimizer, and with several processes the buffers in which gradients are exchanged."""
    sizes = StateSizes(trainer.args)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained) * (2 if trainer.accelerator.num_processes > 1 else 1)
    return gradients + sum(size for p in trained for size in sizes(p)) + sizes.scratch(trainer.model)


def activation_bytes(trainer: PlansActivations, examples: list[Example], positions: int) -> list[int]:
    """What a forward pass over `examples`, `positions` of them, keeps in each layer, and last in all else.

    It is carried on from what shorter passes keep by a line, or by a parabola where that is more: attention with masks keeps
    numbers for pairs of tokens.
    """
    points = dict(_measured(trainer, examples, share) for share in SHARES)
    found = [np.max([*points.values()], axis=0)]
    for degree in range(1, len(points)):
        some = sorted(points)[-degree - 1 :]
        curves = np.polyfit(some, [points[x] for x in some], degree)
        found.append(np.vander([positions], degree + 1)[0] @ curves)
    return [ceil(size) for size in max(found, key=np.sum)]


def _measured(trainer: PlansActivations, examples: list[Example], share: float) -> tuple[int, list[int]]:
    """Positions of a micro-batch of shortened examples, and bytes that its forward pass keeps."""
    model, device = trainer.model, trainer.args.device
    inner = unwrap(model)
    batch = trainer.collate([shortened(example, share) for example in examples]).to(device)
    weights = chain(model.parameters(), model.buffers())
    undrawn = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with (
        undrawn,
        training(model),
        without_graphs(inner),
        _narrowed(inner.config, share),
        trainer.accelerator.autocast(),
    ):
        kept = kept_for_backward(lambda: trainer.forward_pass(model, batch), weights, checkpointable_layers(inner))
    return batch.positions, kept


@contextmanager
def _narrowed(config: PreTrainedConfig, share: float) -> Iterator[None]:
    """Within it, windows of attention are `share` as wide: rows that are longer than one need a mask, shortened as well."""
    text = config.get_text_config()
    windows = {name: vars(text)[name] for name in WINDOWS if vars(text).get(name)}
    try:
        for name, width in windows.items():
            setattr(text, name, max(1, floor(width * share)))
        yield
    finally:
        for name, width in windows.items():
            setattr(text, name, width)


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, those included that torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
