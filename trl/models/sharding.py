"""Weights that FSDP2 or ZeRO-3 have cut into shards: made whole for a while, and models beside the one in training.

FSDP2 and ZeRO-3 keep a share of every weight on each process, and gather a layer's weights whenever it runs. For a
forward and a backward that is little; for sampling, which runs every layer once per token, it is all that happens. So
the weights are gathered once around a rollout batch:

    with whole_weights(model):
        engine.generate(...)        # any number of forward passes, on each process as many as it needs

Weights that are changed by themselves, number by number, need not be gathered: `shards` is what a process holds of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed


def is_whole(model: nn.Module) -> bool:
    """Whether each process holds all weights of `model`."""
    return are_whole(model.parameters())


def are_whole(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether each process holds all of each parameter."""
    return not any(isinstance(p, DTensor) or "ds_id" in p.__dict__ for p in parameters)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """`model`, wrapped for its parallelism or not, with all weights on each process; all processes enter and leave together.

    Within, forward passes communicate nothing, so their number may differ between processes. Not for training.
    """
    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    if is_whole(inner):
        yield
    elif isinstance(inner, FSDPModule):
        with _whole_fsdp(inner):
            yield
    else:
        with _whole_zero3(model):
            yield


def shards(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of the parameters of `model`, by name: all of each, or a share. They may be changed in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: _shard(parameter).detach() for name, parameter in model.named_parameters()}


def _shard(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if "ds_id" in parameter.__dict__ else parameter


def prepare_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """`model`, which is not trained, on the devices: sharded where the model in training is."""
    if accelerator.is_fsdp2:
        ready_for_fsdp2(model)
        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3:
        return _sharded_by_zero3(accelerator.deepspeed_plugin.deepspeed_config, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def ready_for_fsdp2(model: nn.Module) -> None:
    """Make what FSDP2 and accelerate take for granted true of `model`: one module for a weight, and layers that are there."""
    share_modules(model)
    present = {type(module).__name__ for module in model.modules()}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # image encoders name layers of texts that they were trained with
            module._no_split_modules = present & set(module._no_split_modules or ())


def share_modules(model: nn.Module) -> None:
    """Make one module of those that are the same and have the same weights, as the embeddings of encoder and decoder.

    FSDP2 takes a weight for that of one module, but for the input and output embeddings, which accelerate looks after.
    """
    seen: dict[tuple, nn.Module] = {}
    for name, module in list(model.named_modules()):
        own = tuple(map(id, (*module.parameters(recurse=False), *module.buffers(recurse=False))))
        options = frozenset((k, v) for k, v in vars(module).items() if isinstance(v, int | float))
        if own and (first := seen.setdefault((type(module), own, options), module)) is not module:
            model.set_submodule(name, first)


def _sharded_by_zero3(options: Mapping[str, Any], model: nn.Module) -> nn.Module:
    from deepspeed import initialize

    precision = {name: options[name] for name in ("bf16", "fp16") if name in options}
    # No weight is kept whole between two forward passes: what changes a shard changes the model.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **precision}
    engine, *_ = initialize(model=model, config=config)
    engine.eval()
    return engine


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Models that are read meanwhile come whole under ZeRO-3 as well, and are sharded when training begins.

    Their weights are looked at before: to try layouts, to copy references, to put adapters on.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


@contextmanager
def _whole_fsdp(model: FSDPModule) -> Iterator[None]:
    model._get_fsdp_state()._lazy_init()
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for part in parts if (group := part._get_fsdp_state()._fsdp_param_group) is not None]
    # What says whether a layer gives its weights up after forward; there is no public way to read it.
    before = [group.post_forward_mesh_info for group in groups]
    model.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for group, mesh in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh


@contextmanager
def _whole_zero3(engine: nn.Module) -> Iterator[None]:
    from deepspeed.runtime.zero import unwrap_model_for_generation
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    optimizer = engine.optimizer
    offload = optimizer if isinstance(optimizer, DeepSpeedZeRoOffload) else optimizer.parameter_offload
    with unwrap_model_for_generation(engine):
        # What DeepSpeed leaves on the model compares the first forward passes of all processes, and waits for them.
        hooks, number = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
        compare = hooks.pop(number)
        try:
            yield
        finally:
            hooks[number] = compare
