"""Models whose weights are sharded by FSDP2 or ZeRO-3: gather them for sampling, shard frozen models, read local shards.

FSDP2 and ZeRO-3 keep one shard of every weight on each process, and gather a layer's weights whenever it runs. For a
forward and backward pass that costs little; in sampling, which runs every layer once per token, it dominates. So the weights
are gathered once around a rollout batch:

    with whole_weights(model):
        engine.generate(...)        # any number of forward passes, which may differ between processes

Elementwise updates need no gathering: `shards` are the local shards of each process.
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
    """Whether no weight of `model` is sharded."""
    return are_whole(model.parameters())


def are_whole(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether no parameter is sharded."""
    return not any(isinstance(p, DTensor) or "ds_id" in p.__dict__ for p in parameters)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather all weights of `model`, wrapped or not, on each process. All processes must enter and leave the context together.

    Forward passes within do not communicate, so their number may differ between processes. Not for training.
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
    """The local shard of each parameter of `model`, by name (the parameter itself if not sharded), for changes in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: _shard(parameter).detach() for name, parameter in model.named_parameters()}


def _shard(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if "ds_id" in parameter.__dict__ else parameter


def prepare_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Prepare a frozen model for its device, sharded in the same way as the model in training."""
    if accelerator.is_fsdp2:
        ready_for_fsdp2(model)
        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3:
        return _sharded_by_zero3(accelerator.deepspeed_plugin.deepspeed_config, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def ready_for_fsdp2(model: nn.Module) -> None:
    """Adapt `model` to assumptions of FSDP2 and accelerate: a weight has one module, and `_no_split_modules` exist."""
    share_modules(model)
    present = {type(module).__name__ for module in model.modules()}
    for module in model.modules():
        # Image encoders also list layers of the text encoder of their pretraining.
        if isinstance(module, PreTrainedModel):
            module._no_split_modules = present & set(module._no_split_modules or ())


def share_modules(model: nn.Module) -> None:
    """Replace modules of the same class, weights and options by one, such as the embeddings of encoder and decoder.

    FSDP2 assumes that a weight belongs to one module; only tied input and output embeddings are handled by accelerate.
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
    # A threshold of 0 keeps no weight gathered between forward passes, so that changes to shards take effect.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **precision}
    engine, *_ = initialize(model=model, config=config)
    engine.eval()
    return engine


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load models without sharding within the context, even under ZeRO-3, which then shards them when training begins.

    Before that, full weights are needed to check layouts, to copy references and to add adapters.
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
    # This attribute says whether a layer frees gathered weights after forward; there is no public API to read it.
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
        # This hook of DeepSpeed compares the first forward passes of all processes, and so would wait for all of them.
        hooks, number = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
        compare = hooks.pop(number)
        try:
            yield
        finally:
            hooks[number] = compare
