"""Gather a policy's full weights layer by layer, with adapters merged, to send them to an inference server.

    for name, weight in gathered_parameters(model): ...      W₀ + ΔW if a layer has an adapter

It works with DDP, FSDP2 and ZeRO. All processes iterate over all layers, since each contributes its shards; at any time a process
holds one gathered layer in addition to its own weights. Names are those of a checkpoint. Value heads are left out, and a tied
weight comes once, since the receiver ties it again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trl.errors import ModelError
from trl.models.score import without_wrapper
from trl.models.value_heads.auto_models import WithValueHead


def policy_of(model: nn.Module) -> PreTrainedModel | PeftModel:
    """The language model with its adapters, without the wrappers of DDP, FSDP2, ZeRO and value heads."""
    inner = without_wrapper(model)
    return inner.pretrained_model if isinstance(inner, WithValueHead) else inner


def base_of(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def gathered_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of every weight and persistent buffer of the policy in `model`, with adapters merged.

    Names are those of the model without adapters. A tensor is valid until the next one is requested. All processes have to
    iterate to the end. Raises ModelError for quantised weights, into which an adapter cannot be merged without loss.
    """
    policy = policy_of(model)
    _reshard(model)
    base = base_of(policy)
    if getattr(base, "is_quantized", False):
        raise ModelError(
            f"The weights of this {type(base).__name__} are quantised, and an adapter cannot be merged into them without "
            "loss: start the server with --enable-lora, so that the adapter alone is sent, or load the model unquantised."
        )
    seen: set[int] = set()
    for prefix, module in _leaves(base):
        for name, owner, tensor in _whole_state(module):
            if owner not in seen:
                seen.add(owner)
                yield f"{prefix}{name}", tensor
            del tensor  # before the next weight is gathered


def gathered_adapter(policy: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The full tensors of an adapter on the CPU, by their names in the model. All processes must call it."""
    _reshard(policy)
    state = policy.state_dict(keep_vars=True)
    found = {}
    for name, value in state.items():
        if f".{adapter}." in f"{name}." or "modules_to_save" in name:
            with whole([value]) as (tensor,):
                found[name] = tensor.to("cpu", copy=True)
    return found


@contextmanager
def whole(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gather the full tensors on each process. All processes must enter and leave the context together."""
    sharded = [tensor for tensor in tensors if "ds_id" in tensor.__dict__]
    context: Any = nullcontext()
    if sharded:
        from deepspeed.runtime.zero import GatheredParameters

        context = GatheredParameters(sharded)
    with context, torch.no_grad():
        yield [t.full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]


def _leaves(base: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """All modules with the prefix of their weights' names; a layer with adapters is one module, whose parts are skipped."""
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules(remove_duplicate=False):
        if inside and f"{name}.".startswith(inside):
            continue
        inside = (f"{name}.",) if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) else ()
        yield f"{name}." if name else "", module


State = Iterator[tuple[str, int, Tensor]]
"""(name, `id` of the parameter, full tensor) of weights."""


def _whole_state(module: nn.Module) -> State:
    """The weights that belong to this module directly, or to the layer that its adapters wrap."""
    if isinstance(module, BaseTunerLayer):
        yield from _merged(module)
        return
    if isinstance(module, ModulesToSaveWrapper):
        copies = dict(module.modules_to_save.items())
        chosen = copies.get(module.active_adapters[0], module.original_module)
        for name, child in chosen.named_modules():
            for own, owner, tensor in _own(child):
                yield f"{name}.{own}" if name else own, owner, tensor
        return
    yield from _own(module)


def _own(module: nn.Module) -> State:
    state = dict(module.named_parameters(recurse=False))
    state |= {k: v for k, v in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
    for name, owner in state.items():
        with whole([owner]) as (tensor,):
            yield name, id(owner), tensor
            del tensor


def _merged(layer: BaseTunerLayer) -> State:
    """The weights of the base layer with adapters merged, from a temporary copy of the layer with full weights."""
    owned = list(layer.parameters())
    with whole(owned) as tensors:
        replaced = {id(o): nn.Parameter(t, requires_grad=False) for o, t in zip(owned, tensors, strict=True)}
        base = layer.get_base_layer()
        below = dict(base.named_parameters(recurse=False))
        for own in below.values():  # merging changes these in place
            replaced[id(own)] = nn.Parameter(replaced[id(own)].detach().clone(), requires_grad=False)
        twin = _copied(layer, replaced)
        twin.merge(safe_merge=False)
        for name, parameter in twin.get_base_layer().named_parameters(recurse=False):
            yield name, id(below[name]), parameter.detach()


def _copied(layer: BaseTunerLayer, replaced: Mapping[int, nn.Parameter]) -> BaseTunerLayer:
    """A copy of the layer with the parameters in `replaced`, without the hooks of DeepSpeed or FSDP."""
    hooks = [(module, dict(module.__dict__)) for module in layer.modules()]
    try:
        for module, _ in hooks:
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                module.__dict__[name] = type(module.__dict__[name])()
        return copy.deepcopy(layer, dict(replaced))
    finally:
        for module, before in hooks:
            module.__dict__.update(before)


def _reshard(model: nn.Module) -> None:
    """Free weights that a forward pass of FSDP2 left gathered, so that all parameters are shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
