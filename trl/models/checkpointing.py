"""Activations that backward needs: kept by some layers, computed again by the others.

A layer keeps `a` bytes of each position for its backward pass; checkpointed (Chen et al. 2016, arXiv:1604.06174) it keeps
the `h` bytes of its input, and runs forward a second time. With S positions in a forward pass, k of L layers checkpointed
and `r` bytes of all else, a step holds

    bytes(k) = r + S · (a · (L − k) + h · k)

and is fastest with the smallest k whose bytes are free. The first k layers are checkpointed: when they run again, what the
others kept is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(model: nn.Module, options: Mapping[str, Any] | None = None, **more: Any) -> None:
    """Compute a model's activations again in backward, by the method that its release of `transformers` has for it.

    `options` are those of `torch.utils.checkpoint`, and may say `every_n_layers` and `offload` too, as configurations do.
    """
    options = dict(options or {})
    more = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options} | more
    options = options or None
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options, **more)
    else:
        model.gradient_checkpointing_enable(options, **more)


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that `transformers` can checkpoint, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def layers_to_recompute(*, kept: float, recomputed: float, free: float, layers: int) -> int:
    """k: how many of `layers` have to be checkpointed, so that a step fits into `free` bytes.

    It takes `kept` bytes where none is checkpointed, `recomputed` where all are, and between them in proportion; all are
    where even that is not enough.
    """
    if kept <= free:
        return 0
    if recomputed >= free:
        return layers
    return math.ceil(layers * (kept - free) / (kept - recomputed))


def kept_for_backward(run: Callable[[], Any], there: Iterable[Tensor]) -> int:
    """Bytes that `run` keeps for a backward pass, without those of tensors that are `there` anyway."""
    places = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in places:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result  # until here what was kept is alive, so that no two tensors had one place
    return sum(kept.values())


class ChecksFirstLayers(TrainerCallback):
    """Leaves the first `count` layers checkpointed, of all that `transformers` has before training begins."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        for layer in checkpointable_layers(model)[self.count :]:
            layer.gradient_checkpointing = False
