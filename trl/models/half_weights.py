"""Cast the linear weights of a decoder layer to half precision by one kernel, where autocast casts them one by one.

Autocast casts every float32 weight when it is used, and every gradient back: some ten small kernels in each layer, forward
and backward. Here all weights and biases of a layer's linear modules are cast together before the layer runs, and their
gradients are cast back together. The results are the same to the bit.
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


class CastTogether(torch.autograd.Function):
    """Cast float32 tensors to `dtype` by one kernel, and in backward their gradients to float32 by another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        widened = iter(cast([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(widened) for grad in grads)


def cast(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    """Cast the tensors to `dtype`, by one multi-tensor kernel on devices that have one."""
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


def round_together(model: PreTrainedModel) -> int:
    """Make every repeated layer of `model` cast its weights together under autocast; return how many layers do.

    If layers are compiled, call this afterwards: the compiled code then reads weights that are already cast.
    """
    rounding = 0
    for layer in repeated_layers(model):
        linears = linears_of(layer)
        if any(_weights(linears)):
            compiled = layer._compiled_call_impl
            call = compiled or _casting_in_recomputation(layer, linears)
            # This attribute wraps both hooks and compiled code, and is left out of copies and pickles of a module.
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


def _casting_in_recomputation(layer: nn.Module, linears: Sequence[nn.Module]) -> Callable[..., Any]:
    """The layer's call, with weights cast when a checkpointed layer is recomputed in backward as well.

    Recent releases of transformers recompute the layer's forward and not its call, so that its checkpoint function is
    wrapped. Where the weights are cast already, there is nothing left to cast.
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
    """The tensors that autocast would cast: float32 weights and biases of linear modules, with module and name."""
    for module in linears:
        for name in ("weight", "bias"):
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.dtype == torch.float32:
                yield module, name, parameter


def linears_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]


@contextmanager
def rounded(linears: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Replace float32 weights and biases of `linears` by casts to `dtype` within the context.

    Gradients flow back to the parameters that are trained.
    """
    held = list(_weights(linears))
    learn = [p for _, _, p in held if p.requires_grad and torch.is_grad_enabled()]
    halves = dict(zip(map(id, learn), CastTogether.apply(dtype, *learn), strict=True)) if learn else {}
    fixed = [p for _, _, p in held if id(p) not in halves]
    halves |= dict(zip(map(id, fixed), cast([p.detach() for p in fixed], dtype), strict=True))
    try:
        for module, name, parameter in held:
            module._parameters[name] = halves[id(parameter)]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
