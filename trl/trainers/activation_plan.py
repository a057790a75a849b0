"""Choose how many layers to checkpoint: as few as the largest step of the run allows in free memory.

The memory of a step besides the weights is estimated before the first one:

    gradients and optimizer states      from the shapes of trained parameters
    activations                         saved tensors of each layer, measured on shorter micro-batches and extrapolated
    head                                its two tiles of logits

plus a share for fragmentation. `trl.models.checkpointing` computes the number of layers from it.
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
from trl.models.score import networks_of, unwrap
from trl.ops.rng import preserved_rng
from trl.trainers.heaviest import LearnsFromRows, heaviest_window, shortened
from trl.training.optimizers import StateSizes
from trl.types import Batch, Example

FRAGMENTATION = 1.2
"""Bytes that the allocator takes for each byte in use, since memory is fragmented."""
SHARES = (1 / 16, 1 / 8, 1 / 4)
"""Fractions of the largest micro-batch's tokens on which activations are measured."""
TILES = 192 * 2**20
"""Bytes of a tile of the head's logits in float32, and of their gradient in half precision."""
WIDEST = 4
"""Bytes per number of the residual stream, at most."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""Configuration options that limit how far attention looks back."""


@dataclass(frozen=True)
class ActivationPlan:
    """`recomputed` of `layers` are checkpointed. Without checkpointing, a step needs `needed` bytes besides the weights; `free`
    bytes are available."""

    layers: int
    recomputed: int
    needed: int
    free: int

    @classmethod
    def of(cls, *, kept: int, saved: Sequence[float], free: int) -> ActivationPlan:
        """The plan for a step that uses `kept` bytes besides the weights, and `saved[i]` less if layer i is checkpointed."""
        count = layers_to_recompute(kept=kept, saved=saved, free=free / FRAGMENTATION)
        return cls(len(saved), count, ceil(FRAGMENTATION * kept), free)

    @classmethod
    def of_all(cls, model: nn.Module) -> ActivationPlan:
        """The plan with the least memory: checkpoint all layers."""
        layers = len(checkpointable_layers(model))
        return cls(layers, layers, 0, 0)

    def leaves(self, size: int) -> bool:
        """Whether a step without checkpointing leaves `size` more bytes free."""
        return not self.recomputed and self.needed + FRAGMENTATION * size <= self.free

    @property
    def what(self) -> str:
        """Which layers save activations and which recompute them, as the predicate of a sentence."""
        if not self.recomputed:
            return f"kept by all {counted(self.layers, 'layer')}"
        which = "all" if self.recomputed == self.layers else f"{self.recomputed} of"
        return f"recomputed in backward by {which} {counted(self.layers, 'layer')}"

    def __str__(self) -> str:
        return (
            f"Activations are {self.what} (gradient_checkpointing): keeping all, a step would need {size_of(self.needed)} "
            f"besides the weights, and {size_of(self.free)} are free."
        )


class CheckpointFirstLayers(TrainerCallback):
    """Keeps checkpointing only in the first `count` layers: `transformers` enables it in all before training begins."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        for layer in checkpointable_layers(model)[self.count :]:
            layer.gradient_checkpointing = False


class PlansActivations(LearnsFromRows, Protocol):
    """The part of a trainer's interface that planning needs."""

    model: Any
    accelerator: Any

    def plan(self, items: Sequence[Example], count: int) -> list[list[int]]: ...
    def collate(self, items: Sequence[Example]) -> Batch: ...
    def forward_pass(self, model: Any, batch: Batch) -> Any: ...


def plan_activations(trainer: PlansActivations, free: int) -> ActivationPlan:
    """Plan activations for a trainer that is about to train, with `free` bytes on its device."""
    examples = heaviest_micro_batch(trainer)
    positions = trainer.collate(examples).positions
    activations = activation_bytes(trainer, examples, positions)
    kept = trained_bytes(trainer) + TILES + sum(activations)
    start = positions * unwrap(trainer.model).config.get_text_config().hidden_size * WIDEST
    return ActivationPlan.of(kept=kept, saved=[layer - start for layer in activations[:-1]], free=free)


def heaviest_micro_batch(trainer: PlansActivations) -> list[Example]:
    """The examples of the largest micro-batch in the largest step."""
    window = heaviest_window(trainer)
    groups = trainer.plan(window, trainer.args.gradient_accumulation_steps)
    examples = ([window[i] for i in group] for group in groups)
    return max(examples, key=lambda some: trainer.collate(some).positions)


def trained_bytes(trainer: PlansActivations) -> int:
    """Bytes of gradients, optimizer states, and with several processes of the buffers in which gradients are reduced."""
    sizes = StateSizes(trainer.args)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained) * (2 if trainer.accelerator.num_processes > 1 else 1)
    return gradients + sum(size for p in trained for size in sizes(p)) + sizes.scratch(trainer.model)


def activation_bytes(trainer: PlansActivations, examples: list[Example], positions: int) -> list[int]:
    """Bytes that a forward pass over `examples` (in total `positions`) saves in each layer, and last everywhere else.

    They are extrapolated from shorter passes, linearly, or by a parabola if that gives more: attention with masks saves
    tensors of pairs of tokens.
    """
    points = dict(_measured(trainer, examples, share) for share in SHARES)
    found = [np.max([*points.values()], axis=0)]
    for degree in range(1, len(points)):
        some = sorted(points)[-degree - 1 :]
        curves = np.polyfit(some, [points[x] for x in some], degree)
        found.append(np.vander([positions], degree + 1)[0] @ curves)
    return [ceil(size) for size in max(found, key=np.sum)]


def _measured(trainer: PlansActivations, examples: list[Example], share: float) -> tuple[int, list[int]]:
    """Number of positions of a micro-batch of shortened examples, and the bytes that its forward pass saves."""
    model, device = trainer.model, trainer.args.device
    inner = unwrap(model)
    batch = trainer.collate([shortened(example, share) for example in examples]).to(device)
    weights = chain(model.parameters(), model.buffers())
    with (
        preserved_rng(device),
        training(model),
        without_graphs(*networks_of(model)),
        _narrowed(inner.config, share),
        trainer.accelerator.autocast(),
    ):
        kept = kept_for_backward(lambda: trainer.forward_pass(model, batch), weights, checkpointable_layers(inner))
    return batch.positions, kept


@contextmanager
def _narrowed(config: PreTrainedConfig, share: float) -> Iterator[None]:
    """Scale attention windows by `share` within the context: rows longer than the window need a mask, shortened rows as well."""
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
    """Free bytes of a CUDA device, including those that torch's allocator has cached."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
