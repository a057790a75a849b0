"""Activations that backward needs: kept by some layers, computed again by the others.

Layer i keeps aᵢ bytes for its backward pass; checkpointed (Chen et al. 2016, arXiv:1604.06174) it keeps the h bytes of its
input, and runs forward a second time. With k of L layers checkpointed and r bytes of all else, a step holds

    bytes(k) = r + k h + Σ aᵢ   over i > k

and is fastest with the smallest k whose bytes are free. The first k layers are checkpointed: when they run again, what the
others kept is gone.
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


def layers_to_recompute(*, kept: float, saved: Sequence[float], free: float) -> int:
    """k: how many layers have to be checkpointed, so that a step fits into `free` bytes.

    It takes `kept` bytes where none is checkpointed, and `saved[i]` less for layer i; all are where even that is not enough.
    """
    for count, less in enumerate(accumulate(saved, initial=0.0)):
        if kept - less <= free:
            return count
    return len(saved)


def kept_for_backward(run: Callable[[], Any], there: Iterable[Tensor], layers: Sequence[nn.Module] = ()) -> list[int]:
    """Bytes that `run` keeps for a backward pass: those of each of `layers` alone, and last all others, such as masks.

    Tensors that are `there` anyway do not count.
    """
    places = {tensor.untyped_storage().data_ptr() for tensor in there}
    kept: dict[int, tuple[int, int]] = {}
    running = [len(layers)]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (place := storage.data_ptr()) not in places:
            owner, size = kept.get(place, (running[-1], 0))
            kept[place] = owner if owner == running[-1] else len(layers), max(size, storage.nbytes())
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _telling(layers, running), torch.enable_grad(), hooks:
        result = run()
    del result  # until here what was kept is alive, so that no two tensors had one place
    found = [0] * (len(layers) + 1)
    for layer, size in kept.values():
        found[layer] += size
    return found


def _leave(running: list[int]) -> None:
    """Gives nothing, as what a hook gives would take the place of the layer's output."""
    running.pop()


@contextmanager
def _telling(layers: Sequence[nn.Module], running: list[int]) -> Iterator[None]:
    """Within it, the number of the layer that runs is the last of `running`."""
    with ExitStack() as hooks:
        for i, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, i=i: running.append(i)))
            hooks.enter_context(layer.register_forward_hook(lambda *_: _leave(running), always_call=True))
        yield
