"""A decoder layer with fewer kernels, for decode steps of architectures whose layer computes

    h ← h + W_o attention(norm₁(h))
    h ← h + W_d (act(W_g x) ⊙ W_u x),   x = norm₂(h)

One matrix product computes queries, keys and values; each residual is added by the matrix product that computes it (addmm);
activation and gate are one kernel. A layer is replaced while decoding only if it gives the same results on random numbers.
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
"""Most bytes for concatenated weights: merging the query, key and value projections needs a copy of their weights."""


class MergedProducts:
    """Several linear layers that read the same input, computed as one matrix product with their concatenated weights.

    Calling layer 0 computes the outputs of all; the others then return their part, if their input is the same tensor.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.sizes = [linear.out_features for linear in linears]
        self.weight = torch.cat([_weight(linear) for linear in linears])
        biases = [linear._parameters.get("bias") for linear in linears]
        self.bias = torch.cat(biases) if biases[0] is not None else None
        self.linears = linears
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def product(self, number: int, x: Tensor) -> Tensor:
        """The output of linear layer `number` for x."""
        if number == 0:
            self.input, self.outputs = x, F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        elif x is not self.input:
            return F.linear(x, _weight(self.linears[number]), self.linears[number]._parameters.get("bias"))
        return self.outputs[number]


@dataclass(frozen=True, slots=True)
class GatedLayer:
    """The modules of a layer that computes the equations at the top of this file, and the variants of its two norms."""

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
        """The layer's output `[B,1,H]`, written over its input. The attention's output projection is done here, not in it."""
        h = hidden_states.view(-1, hidden_states.shape[-1])
        attended, *_ = self.attention(hidden_states=self._norm(self.before, 0, hidden_states), **options)
        add_product(h, attended, self.out)
        x = self._norm(self.between, 1, h)
        gate, up = (F.linear(x, _weight(linear)) for linear in (self.gate, self.up))
        add_product(h, gated(gate, up, self.activation), self.down)
        return hidden_states

    def _norm(self, module: nn.Module, place: int, x: Tensor) -> Tensor:
        """The norm of x, rounded to the dtype of the weights that multiply it next, as autocast does."""
        kind, dtype = self.kinds[place], _weight(self.gate).dtype
        return norm_of(module, x, kind=kind, dtype=dtype)


def add_product(h: Tensor, x: Tensor, linear: nn.Linear) -> None:
    """h `[B,H]` += W x, in one kernel where all dtypes are equal and there is no bias."""
    weight, bias, x = _weight(linear), linear._parameters.get("bias"), x.reshape(-1, linear.in_features)
    if bias is None and h.dtype == x.dtype == weight.dtype:
        h.addmm_(x, weight.t())
    else:
        h.add_(F.linear(x, weight, bias))


# ── finding what can be replaced ────────────────────────────────────────────────────────────────────────────────


def merged_products(model: nn.Module) -> list[MergedProducts]:
    """Merged query, key and value projections of every attention module; none if their weights exceed `MERGED_BYTES`."""
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
    """The modules of `layer` if it is built like a `GatedLayer`, without adapters or hooks on them; else None.

    `kinds` holds the variants of the model's RMSNorms.
    """
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
    """True if the layer gives the results of `parts.step` on random numbers, with attention reduced to its output projection.

    The input is small compared to the branches added to it, so that the comparison is about the branches.
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
    except (TypeError, ValueError, AttributeError, RuntimeError):  # the layer needs more than hidden states
        return False
    same_type = isinstance(expected, Tensor) and expected.dtype == found.dtype
    return same_type and close(found, expected, factors=factors)


def layers_of(model: nn.Module, kinds: dict[nn.Module, NormKind]) -> list[tuple[nn.Module, GatedLayer]]:
    """The layers to replace while decoding. Of layers with the same class, norms, activation and size, one is tried."""
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
