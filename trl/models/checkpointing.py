"""Selective activation checkpointing: some layers save their activations, the others recompute them in backward.

Layer i saves aᵢ bytes for its backward pass; checkpointed (Chen et al. 2016, arXiv:1604.06174) it saves only its input of h
bytes, and runs forward a second time. With the first k of L layers checkpointed and r bytes for all else, a step needs

    bytes(k) = r + k h + Σ aᵢ   over i > k

The fastest choice is the smallest k that fits into free memory. The first layers are the ones to checkpoint: when backward
recomputes them, the activations of the upper layers are already freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(model: nn.Module, options: Mapping[str, Any] | None = None, **more: Any) -> None:
    """Enable activation checkpointing of `model`, by the method that the installed release of `transformers` has.

    `options` are keyword arguments of `torch.utils.checkpoint`, and may contain `every_n_layers` and `offload` as well.
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


def layers_to_recompute(*, kept: float, saved: Sequence[float], free: float) -> int:
    """The smallest number k of checkpointed layers with which a step fits into `free` bytes; all layers if none does.

    A step takes `kept` bytes without checkpointing, and `saved[i]` bytes less if layer i is checkpointed.
    """
    for count, less in enumerate(accumulate(saved, initial=0.0)):
        if kept - less <= free:
            return count
    return len(saved)


def kept_for_backward(
    run: Callable[[], Any], existing: Iterable[Tensor], layers: Sequence[nn.Module] = ()
) -> list[int]:
    """Bytes that `run` saves for backward: by each of `layers` alone, and last all others, such as masks that layers share.

    Tensors in `existing` (weights, inputs) do not count.
    """
    places = {tensor.untyped_storage().data_ptr() for tensor in existing}
    kept: dict[int, tuple[int, int]] = {}
    running = [len(layers)]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (place := storage.data_ptr()) not in places:
            owner, size = kept.get(place, (running[-1], 0))
            kept[place] = owner if owner == running[-1] else len(layers), max(size, storage.nbytes())
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _tracking(layers, running), torch.enable_grad(), hooks:
        result = run()
    del result  # keeps all saved tensors alive until here, so that no two of them had the same address
    found = [0] * (len(layers) + 1)
    for layer, size in kept.values():
        found[layer] += size
    return found


def _leave(running: list[int]) -> None:
    """Return None: what a forward hook returns would replace the layer's output."""
    running.pop()


@contextmanager
def _tracking(layers: Sequence[nn.Module], running: list[int]) -> Iterator[None]:
    """Keep the index of the layer that is running as the last item of `running`, by hooks."""
    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, i=i: running.append(i)))
            hooks.enter_context(layer.register_forward_hook(lambda *_: _leave(running), always_call=True))
        yield
