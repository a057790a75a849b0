"""LoRA layers with few kernels and few saved activations.

    y = W x + s B A d(x)        d: dropout, s = α / r        Hu et al. 2021 (arXiv:2106.09685), equation 3

`peft` computes B A d(x), its multiple by s, and the sum in a kernel each, and rounds every result. Here one matrix product scales
by s, adds to W x and rounds once; gradients are scaled by s in the same way. For backward, `peft` saves d(x) for each linear
layer; here x is saved, which linear layers with the same input share, and the dropout mask. The input of the down projection of
a gated MLP is recomputed from its two factors, which are saved anyway: see `trl.models.kept_activations`.

Small models are bound by how fast the host launches kernels, and adapters on all linear layers more than double the launches.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from trl.models.kept_activations import Activation, gated_product, is_plain

KINDS = ("Linear", "Linear4bit", "Linear8bitLt")
"""LoRA layers of `peft` that compute this formula, around a linear layer with a frozen weight."""


class LowRank(torch.autograd.Function):
    """y + s B A d(x) `[N,O]` of y `[N,O]`, x `[N,I]`, A `[r,I]` and B `[O,r]` of one dtype, s, and the dropout probability.

    If x = act(g) ⊙ u, `factors` are act, g and u `[…,I]`: g and u are then saved for backward in place of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropped: float,
        factors: tuple[Activation, Tensor, Tensor] | None,
    ) -> Tensor:
        mask, used = None, x
        if dropped:
            used, mask = torch.native_dropout(x, dropped, True)
        inner = used @ a.T
        ctx.activation, *source = factors or (None, x)
        ctx.save_for_backward(mask, inner, a, b, *source)
        ctx.scaling, ctx.kept = scaling, 1 / (1 - dropped) if dropped < 1 else 0.0
        return torch.addmm(y, inner, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, inner, a, b, *source = ctx.saved_tensors

        def with_dropout(values: Tensor) -> Tensor:
            """Apply the dropout mask of forward to values, or to gradients."""
            return values if mask is None else torch.ops.aten.native_dropout_backward(values, mask, ctx.kept)

        of_inner = torch.addmm(inner, grad, b, beta=0, alpha=ctx.scaling)
        of_x = with_dropout(of_inner @ a) if ctx.needs_input_grad[1] else None
        of_a = of_b = None
        if ctx.needs_input_grad[2]:
            x = source[0] if ctx.activation is None else gated_product(ctx.activation, *source).flatten(0, -2)
            of_a = of_inner.T @ with_dropout(x)
        if ctx.needs_input_grad[3]:
            of_b = torch.addmm(b, grad.T, inner, beta=0, alpha=ctx.scaling)
        return grad, of_x, of_a, of_b, None, None, None


def fuse_adapters(model: nn.Module) -> int:
    """Replace the forward of plain LoRA layers in `model` by the fused one of this file; return how many there are."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_known(module)]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    return len(layers)


def _is_known(layer: nn.Module) -> bool:
    kind = type(layer)
    return kind.__module__.startswith("peft.") and kind.__name__ in KINDS and "forward" not in vars(layer)


def forward(
    self: Any, x: Tensor, *args: Any, factors: tuple[Activation, Tensor, Tensor] | None = None, **kwargs: Any
) -> Tensor:
    """Forward of a LoRA layer: `LowRank` if exactly one plain adapter is active, else the forward of `peft`."""
    if args or kwargs or not _is_plain(self):
        return type(self).forward(self, x, *args, **kwargs)
    (name,) = self.active_adapters
    a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
    y, scaling = self.base_layer(x), self.scaling[name]
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else a.weight.dtype
    if y.dtype != dtype:
        return (y + b(a(dropout(x.to(a.weight.dtype)))) * scaling).to(y.dtype)
    flat_x, flat_y = x.to(dtype).flatten(0, -2), y.flatten(0, -2)
    dropped = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    factors = factors if x.dtype == dtype else None
    added = LowRank.apply(flat_y, flat_x, a.weight.to(dtype), b.weight.to(dtype), scaling, dropped, factors)
    return added.view_as(y)


forward.takes_factors = True  # a gated MLP looks for this on its down projection


def _is_plain(layer: Any) -> bool:
    """Whether exactly one adapter is active, and has only A, B and dropout: variants such as DoRA have another formula."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return is_plain(a) and is_plain(b) and b.bias is None and type(dropout) in (nn.Dropout, nn.Identity)
