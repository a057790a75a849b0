"""Decoder layers of a decoding step with fewer kernels, where an architecture's layer computes what this one does.

    h ← h + W_o attention(norm₁(h))
    h ← h + W_d (act(W_g x) ⊙ W_u x),   x = norm₂(h)

One product makes queries, keys and values; what is added to h is added by the product that makes it; activation and gate
are one kernel. A layer is replaced while decoding if it gives the same as this one on random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trl.models.fused import close
from trl.models.kept_activations import is_plain
from trl.models.patching import replaced_forwards
from trl.ops.triton_gate import gated, name_of
from trl.rollouts.fused import NormKind, norm_of

MERGED_BYTES = 2**29
"""Weights that products of one input are made from in one are copies; no more than so many bytes of them are made."""


class MergedProducts:
    """Products of one input with the weights of several linear layers, made in one when the first is asked for."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.weight = torch.cat([_weight(linear) for linear in linears])
        biases = [linear._parameters.get("bias") for linear in linears]
        self.bias = torch.cat(biases) if biases[0] is not None else None
        self.linears = linears
        self.of: Tensor | None = None
        self.found: tuple[Tensor, ...] = ()

    def product(self, number: int, x: Tensor) -> Tensor:
        """What linear layer `number` makes of x."""
        if number == 0:
            self.of, self.found = x, F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        elif x is not self.of:
            return F.linear(x, _weight(self.linears[number]), self.linears[number]._parameters.get("bias"))
        return self.found[number]


@dataclass(frozen=True, slots=True)
class GatedLayer:
    """The parts of a layer that computes what stands at the top of this file, and the kinds of its norms."""

    before: nn.Module
    attention: nn.Module
    between: nn.Module
    kinds: tuple[NormKind, NormKind]
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    out: nn.Linear
    activation: str

    def step(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """The layer's output `[B,1,H]`, written over its input. The attention's last product is left to this one."""
        h = hidden_states.view(-1, hidden_states.shape[-1])
        attended, *_ = self.attention(hidden_states=self._norm(self.before, 0, hidden_states), **options)
        add_product(h, attended, self.out)
        x = self._norm(self.between, 1, h)
        gate, up = (F.linear(x, _weight(linear)) for linear in (self.gate, self.up))
        add_product(h, gated(gate, up, self.activation), self.down)
        return hidden_states

    def _norm(self, module: nn.Module, place: int, x: Tensor) -> Tensor:
        """Rounded to the type of the weights that it is multiplied with next, as autocast does."""
        kind, dtype = self.kinds[place], _weight(self.gate).dtype
        return norm_of(module, x, kind=kind, dtype=dtype)


def add_product(h: Tensor, x: Tensor, linear: nn.Linear) -> None:
    """h `[B,H]` += W x, in one kernel where the types are one."""
    weight, bias, x = _weight(linear), linear._parameters.get("bias"), x.reshape(-1, linear.in_features)
    if bias is None and h.dtype == x.dtype == weight.dtype:
        h.addmm_(x, weight.t())
    else:
        h.add_(F.linear(x, weight, bias))


# ── finding what can be replaced ────────────────────────────────────────────────────────────────────────────────


def merged_products(model: nn.Module) -> list[MergedProducts]:
    """For each attention with three linear layers of one input; none, if their weights are large."""
    found = []
    for module in model.modules():
        linears = [module._modules.get(name) for name in ("q_proj", "k_proj", "v_proj")]
        if not all(map(is_plain, linears)):
            continue
        if (
            len({(each.in_features, _weight(each).dtype, each._parameters.get("bias") is None) for each in linears})
            == 1
        ):
            found.append(linears)
    size = sum(_weight(linear).nbytes for linears in found for linear in linears)
    return [MergedProducts(linears) for linears in found] if size <= MERGED_BYTES else []


def gated_layer(layer: nn.Module, kinds: dict[nn.Module, NormKind]) -> GatedLayer | None:
    """The parts of `layer`, if it has those of a `GatedLayer` and nothing was put on them; kinds are of known norms."""
    parts = layer._modules
    before, between = parts.get("input_layernorm"), parts.get("post_attention_layernorm")
    attention, mlp = parts.get("self_attn"), parts.get("mlp")
    if before not in kinds or between not in kinds or attention is None or mlp is None or "forward" in vars(layer):
        return None
    linears = [mlp._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    out, activation = attention._modules.get("o_proj"), name_of(getattr(mlp, "act_fn", None))
    plain = all(map(is_plain, [*linears, out])) and len({_weight(linear).dtype for linear in (*linears, out)}) == 1
    if not plain or activation is None or any("bias" in dict(linear.named_parameters()) for linear in linears[:2]):
        return None
    gate, up, down = linears
    both = kinds[before], kinds[between]
    return GatedLayer(before, attention, between, both, gate, up, down, out, activation)


def computes(layer: nn.Module, parts: GatedLayer) -> bool:
    """Whether the layer gives what `parts.step` does, with an attention that only multiplies.

    Its input is small beside its branches, so that these are what is compared.
    """
    device, dtype, factors = _weight(parts.before).device, _weight(parts.before).dtype, _weight(parts.gate).dtype
    size, wide = len(_weight(parts.before)), parts.out.in_features
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(3, 1, size, generator=generator, device=device).mul_(0.02).to(dtype)
    mixed = torch.autocast(device.type, factors, enabled=factors != dtype)

    def widened(hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states.repeat(1, 1, -(-wide // size))[..., :wide]

    try:
        with mixed, replaced_forwards({parts.attention: lambda **given: (parts.out(widened(**given)), None)}):
            expected = layer(x.clone())
        with mixed, replaced_forwards({parts.attention: lambda **given: (widened(**given), None)}):
            found = parts.step(x.clone())
    except (TypeError, ValueError, AttributeError, RuntimeError):  # it asks for more than hidden states
        return False
    same_type = isinstance(expected, Tensor) and expected.dtype == found.dtype
    return same_type and close(found, expected, factors=factors)


def layers_of(model: nn.Module, kinds: dict[nn.Module, NormKind]) -> list[tuple[nn.Module, GatedLayer]]:
    """Layers that are replaced while decoding. One of each form is tried."""
    tried: dict[tuple[object, ...], bool] = {}
    found = []
    for layer in model.modules():
        parts = gated_layer(layer, kinds)
        if parts is None:
            continue
        form = type(layer), parts.kinds, parts.activation, prod(parts.gate.weight.shape)
        if form not in tried:
            tried[form] = computes(layer, parts)
        if tried[form]:
            found.append((layer, parts))
    return found


def _weight(module: nn.Module) -> Tensor:
    return module._parameters["weight"]
