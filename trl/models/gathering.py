"""The weights of a policy as its checkpoint has them, layer by layer, whatever engine holds them: what samplers are sent.

    for name, weight in gathered_parameters(model): ...      W₀ + ΔW where an adapter stands on a layer

Every process walks through all layers, since all give their shards; one of them keeps what it is given. At any time a process
holds one whole layer beyond what it held before. Value heads are left out, and so are second names of a shared weight, which
whoever reads the weights ties again.
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
    """The language model, with its adapters, inside the wrappers of parallelism and a value head's model."""
    inner = without_wrapper(model)
    return inner.pretrained_model if isinstance(inner, WithValueHead) else inner


def base_of(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def gathered_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every weight and persistent buffer of the policy in `model`, adapters merged.

    Names are those of the model without adapters. A tensor is good until the next one is asked for. All processes have to walk
    through to the end. Raises ModelError for quantised weights, which an adapter cannot be merged into without loss.
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
            del tensor  # before the next weight is made whole


def gathered_adapter(policy: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The whole tensors of an adapter by their names in the model, on the CPU. All processes take part."""
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
    """All of each tensor, on each process; all processes enter and leave together."""
    sharded = [tensor for tensor in tensors if "ds_id" in tensor.__dict__]
    context: Any = nullcontext()
    if sharded:
        from deepspeed.runtime.zero import GatheredParameters

        context = GatheredParameters(sharded)
    with context, torch.no_grad():
        yield [t.full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]


def _leaves(base: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules in order with the prefix of their weights' names; what adapters wrap is one module."""
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules(remove_duplicate=False):
        if inside and f"{name}.".startswith(inside):
            continue
        inside = (f"{name}.",) if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) else ()
        yield f"{name}." if name else "", module


State = Iterator[tuple[str, int, Tensor]]
"""Weights by name: the `id` of the tensor that each is of, and the whole of it."""


def _whole_state(module: nn.Module) -> State:
    """The weights that stand in this module itself, or in the module that adapters have wrapped."""
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
    """The weights of the layer below, with those of its adapters added: a whole copy of the layer is merged, and dropped."""
    owned = list(layer.parameters())
    with whole(owned) as tensors:
        replaced = {id(o): nn.Parameter(t, requires_grad=False) for o, t in zip(owned, tensors, strict=True)}
        base = layer.get_base_layer()
        below = dict(base.named_parameters(recurse=False))
        for own in below.values():  # merging changes these
            replaced[id(own)] = nn.Parameter(replaced[id(own)].detach().clone(), requires_grad=False)
        twin = _copied(layer, replaced)
        twin.merge(safe_merge=False)
        for name, parameter in twin.get_base_layer().named_parameters(recurse=False):
            yield name, id(below[name]), parameter.detach()


def _copied(layer: BaseTunerLayer, replaced: Mapping[int, nn.Parameter]) -> BaseTunerLayer:
    """A copy of the layer over other parameters, without the hooks of DeepSpeed or FSDP."""
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
    """Give up what a forward pass left gathered, so that a module's weights are its shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
