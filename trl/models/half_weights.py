"""Weights of linear layers under autocast, rounded by one kernel per decoder layer and not one by one.

Autocast rounds every float32 weight when it is used, and gives every gradient back in a kernel of its own: ten small
kernels in each layer, forward and backward. Here a layer's linear weights and biases are rounded together before it is
called, and their gradients are widened together. The numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl.models.compiled import repeated_layers


class Rounded(torch.autograd.Function):
    """Tensors in another type, by one kernel; so their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        widened = iter(cast([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(widened) for grad in grads)


def cast(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    """The tensors in `dtype`, by one kernel where the device has it."""
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


def round_together(model: PreTrainedModel) -> int:
    """Let every repeated layer of `model` round its weights together when it runs under autocast; how many do.

    Call it after layers are compiled, where they are: what is compiled then reads weights that are rounded.
    """
    rounding = 0
    for layer in repeated_layers(model):
        linears = linears_of(layer)
        if any(_weights(linears)):
            compiled = layer._compiled_call_impl
            call = compiled or _rounding_again(layer, linears)
            # The one place around hooks and compiled code that modules leave out of their copies and pickles.
            layer._compiled_call_impl = _with_rounded_weights(linears, call)
            rounding += 1
    return rounding


def _with_rounded_weights(linears: Sequence[nn.Module], call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        device = linears[0].weight.device.type
        if not torch.is_autocast_enabled(device):
            return call(*args, **kwargs)
        with rounded(linears, torch.get_autocast_dtype(device)):
            return call(*args, **kwargs)

    return run


def _rounding_again(layer: nn.Module, linears: Sequence[nn.Module]) -> Callable[..., Any]:
    """The layer's call; what it computes again in backward, inside itself, reads weights that are rounded as well.

    Recent releases of transformers compute the layer's forward again, and not its call. A layer whose weights are
    rounded already finds nothing to round.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        own = vars(layer)
        checkpoint = own.get("_gradient_checkpointing_func")
        if checkpoint is None:
            return layer._call_impl(*args, **kwargs)
        own["_gradient_checkpointing_func"] = lambda function, *inputs: checkpoint(
            _with_rounded_weights(linears, function), *inputs
        )
        try:
            return layer._call_impl(*args, **kwargs)
        finally:
            own["_gradient_checkpointing_func"] = checkpoint

    return call


def _weights(linears: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """What autocast would round: weights and biases of linear layers."""
    for module in linears:
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.dtype == torch.float32:
                yield module, name, parameter


def linears_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]


@contextmanager
def rounded(linears: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Within it, linear layers in float32 hold their weights and biases in `dtype`; gradients flow to those that learn."""
    held = list(_weights(linears))
    learn = [p for _, _, p in held if p.requires_grad and torch.is_grad_enabled()]
    halves = dict(zip(map(id, learn), Rounded.apply(dtype, *learn), strict=True)) if learn else {}
    fixed = [p for _, _, p in held if id(p) not in halves]
    halves |= dict(zip(map(id, fixed), cast([p.detach() for p in fixed], dtype), strict=True))
    try:
        for module, name, parameter in held:
            module._parameters[name] = halves[id(parameter)]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
