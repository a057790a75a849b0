"""Estimate the memory of a run before it starts, by tracing its heaviest optimizer step on fake tensors.

Memory for libraries, sampling and data parallelism is added to the traced peak. `trl.models.memory` has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn

from trl.models.checkpointing import checkpoint_activations, checkpointable_layers
from trl.models.fused import restoring_rotations
from trl.models.graphs import captures, without_graphs
from trl.models.memory import (
    ACTIVATIONS,
    CACHE,
    GRADIENTS,
    OPTIMIZER,
    REFERENCE,
    WEIGHTS,
    peak_parts,
    take_shape,
    trace_step,
    tracing,
)
from trl.models.score import networks_of, unwrap
from trl.trainers.activation_plan import ActivationPlan
from trl.trainers.base import BaseTrainer
from trl.trainers.heaviest import heaviest_window
from trl.trainers.online_config import OnlineConfig
from trl.trainers.sampling_memory import sampling_bytes
from trl.training.optimizers import StateSizes
from trl.types import Batch, Example

LIBRARIES = "libraries"
MIB = 2**20
FIRST_USE = {"cpu": 20 * MIB, "cuda": 685 * MIB}
"""Bytes that torch and its kernels allocate on first use, whatever the model. `benchmarks/memory.py` compares the first
with measured runs; the second is a CUDA context with cuBLAS, measured on an H200."""

SHARDED = {"zero1": (OPTIMIZER,), "zero2": (OPTIMIZER, GRADIENTS), "zero3": (OPTIMIZER, GRADIENTS, WEIGHTS)}
SHARDED["fsdp2"] = SHARDED["zero3"]
"""Parts of memory that each shipped accelerate configuration shards across processes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes on each device, by part."""

    parts: dict[str, int]
    device: str
    processes: int = 1
    available: int | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available


def estimate_memory(
    trainer: BaseTrainer, *, sharding: str | None = None, processes: int = 1, quantised_bits: int | None = None
) -> MemoryEstimate:
    """Peak memory of the heaviest optimizer step of `trainer`, made without weights; `with_sampling` adds sampling.

    `sharding` names a shipped accelerate configuration; `quantised_bits` are the bits per frozen, quantised weight.
    Images count as text tokens: the control flow of image encoders depends on values, which fake tensors lack.
    """
    device = trainer.args.device
    images, trainer.images, trainer.image_features = trainer.images, None, None
    libraries = libraries_bytes(device)
    config = unwrap(trainer.model).config.get_text_config(decoder=True)
    if quantised_bits == 8:
        trainer.args.cuda_graphs = False  # training with weights in 8 bits captures no CUDA graphs either
    if quantised_bits is not None:
        _round_as_factors(trainer)
    with restoring_rotations(unwrap(trainer.model)), tracing(config.vocab_size) as trace:
        take_shape(trainer.model, device)
        trace.mark(trainer.model.parameters(), WEIGHTS)
        trace.mark(trainer.model.buffers(), WEIGHTS)
        before = len(trace.part)
        type(trainer).plain_prepare_model(trainer)
        trace.part.update({n: REFERENCE for n in range(before, len(trace.part)) if trace.alive(n)})
        trainer.accelerator.prepare_model(trainer.model, device_placement=False, evaluation_mode=True)  # autocast
        step, states = _Step(trainer, heaviest_window(trainer)), StateSizes(trainer.args)
        scratch = states.scratch(trainer.model)
        trace_step(trace, trainer.model, step, state_sizes=states, scratch=scratch)
    trainer.images = images
    parts = peak_parts(trace.events, trace.part)
    parts[LIBRARIES] = libraries
    if quantised_bits is not None:
        parts = quantised(parts, trainer.model, quantised_bits)
    estimate = MemoryEstimate(parts, device.type, available=available_bytes(device))
    return _divided(estimate, sharding, processes, trainer.model)


def planned(
    trainer: BaseTrainer, another: Callable[[], BaseTrainer], estimate: Callable[[BaseTrainer], MemoryEstimate]
) -> tuple[MemoryEstimate, ActivationPlan | None]:
    """The `estimate` of a run including sampling, and the activation checkpointing plan that training will choose, if
    any.

    `another()` makes a second trainer, because an estimate replaces the weights of the trainer that it is given.
    """
    if not trainer.plans_activations():
        return with_sampling(estimate(trainer), trainer), None
    layers, second = len(checkpointable_layers(trainer.model)), another()
    trainer.args.recompute(activations=False)
    second.args.recompute(activations=True)
    kept, recomputed = estimate(trainer), estimate(second)
    there = sum(kept.parts[part] for part in (WEIGHTS, REFERENCE, LIBRARIES))
    saved = [(kept.total - recomputed.total) / layers] * layers
    args = trainer.args
    stays = isinstance(args, OnlineConfig) and args.use_vllm and not args.vllm_enable_sleep_mode
    free = (kept.available or 0) - there - (vllm_bytes(args) if stays else 0)
    plan = ActivationPlan.of(kept=kept.total - there, saved=saved, free=free)
    share = plan.recomputed / plan.layers
    names = {**kept.parts, **recomputed.parts}
    sizes = ((name, kept.parts.get(name, 0), recomputed.parts.get(name, 0)) for name in names)
    parts = {name: round(all_kept + share * (none - all_kept)) for name, all_kept, none in sizes}
    trainer.activation_plan = plan
    trainer._capture_layers(unwrap(trainer.model))  # `with_sampling` asks whether layers are captured as CUDA graphs
    return with_sampling(replace(kept, parts=parts), trainer), plan


class _Step:
    """Forward and backward of all micro-batches of one optimizer step, as the trainer would split them."""

    def __init__(self, trainer: BaseTrainer, examples: Sequence[Example]) -> None:
        self.trainer, self.examples = trainer, examples
        args = trainer.args
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        trainer._tr_loss = torch.zeros((), device=args.device)
        trainer.state.max_steps = 1
        if isinstance(args, OnlineConfig):
            trainer.get_train_dataloader()
        if args.gradient_checkpointing:
            inner = unwrap(trainer.model)
            given = {"use_reentrant": False, **(args.gradient_checkpointing_kwargs or {})}
            given.pop("offload", None)  # activations offloaded to the host are counted as if they stayed on the device
            checkpoint_activations(inner, given)
            inner.enable_input_require_grads()

    def __call__(self) -> None:
        trainer, count = self.trainer, self.trainer.args.gradient_accumulation_steps
        size = -(-len(self.examples) // count)
        rows = [list(self.examples[i : i + size]) for i in range(0, len(self.examples), size)]
        slots, _ = trainer.get_batch_samples(iter(rows), count, trainer.args.device)
        inner = unwrap(trainer.model)
        if all(captures(inner, batch.positions) for batches in slots for batch in batches):
            for parameter in trainer.model.parameters():  # CUDA graphs accumulate into preallocated gradients
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with without_graphs(*networks_of(trainer.model)):
            for batches in slots:
                trainer.training_step(trainer.model, [_unmasked(batch) for batch in batches], 1)


def _unmasked(batch: Batch) -> Batch:
    """The batch without a mask or positions that mask nothing: models would read their values, which fake tensors
    lack."""
    inputs = dict(batch.inputs)
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if mask is not None and mask.numel() == batch.tokens:
        del inputs["attention_mask"]
    if batch.segments is None and positions is not None and batch.last.numel() == len(positions):
        del inputs["position_ids"]
    return replace(batch, inputs=inputs)


def quantised(parts: dict[str, int], model: nn.Module, bits: int) -> dict[str, int]:
    """`parts` with frozen matrices stored in `bits` per weight; 4-bit weights have a float32 scale for every 64."""
    scale = 4 / 64 if bits == 4 else 0
    frozen = [layer.weight for layer in _frozen_layers(model)]
    saved = sum(int(w.nbytes - w.numel() * (bits / 8 + scale)) for w in frozen)
    return {**parts, WEIGHTS: parts[WEIGHTS] - saved}


def _round_as_factors(trainer: BaseTrainer) -> None:
    """Cast frozen matrices to the autocast dtype: quantised weights are dequantised to it, so autocast copies none."""
    args = trainer.args
    if args.bf16 or args.fp16:
        for layer in _frozen_layers(trainer.model):
            layer.weight.data = layer.weight.data.to(torch.bfloat16 if args.bf16 else torch.float16)


def _frozen_layers(model: nn.Module) -> list[nn.Linear]:
    """Linear layers that quantisation applies to: all but the output embeddings and those of an adapter."""
    head = unwrap(model).get_output_embeddings()
    linear = (module for module in unwrap(model).modules() if isinstance(module, nn.Linear))
    return [layer for layer in linear if layer is not head and not layer.weight.requires_grad]


def _divided(estimate: MemoryEstimate, sharding: str | None, processes: int, model: nn.Module) -> MemoryEstimate:
    """The estimate per process: sharded parts divided by `processes`, or DDP's gradient buckets added."""
    if processes == 1:
        return estimate
    parts = dict(estimate.parts)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    divided = SHARDED.get(sharding or "ddp", ())
    for name in divided:
        parts[name] = -(-parts[name] // processes)
    if not divided:
        parts["buckets of gradients"] = trained
    return replace(estimate, parts=parts, processes=processes)


def with_sampling(estimate: MemoryEstimate, trainer: BaseTrainer) -> MemoryEstimate:
    """The estimate with the KV cache of a trainer that samples, or with all that vLLM takes in its process.

    CUDA graphs keep the memory of a training step while sampling, so the cache is added to it. Without them, sampling
    and training take turns, and the larger of the two counts. vLLM takes no turns, unless it sleeps.
    """
    args, parts, inner = trainer.args, estimate.parts, unwrap(trainer.model)
    if not isinstance(args, OnlineConfig):
        return estimate
    cache = vllm_bytes(args) if args.use_vllm else sampling_bytes(args, inner, trainer.train_dataset)
    stays = args.use_vllm and not args.vllm_enable_sleep_mode
    if not stays and not captures(inner, 0):
        if cache <= parts.get(ACTIVATIONS, 0) + parts[GRADIENTS]:
            return estimate
        parts = {**parts, ACTIVATIONS: 0, GRADIENTS: 0}
    return replace(estimate, parts={**parts, CACHE: cache})


def vllm_bytes(args: OnlineConfig) -> int:
    """Bytes that vLLM takes in the trainer's process; 0 on servers."""
    if args.vllm_mode == "server" or args.device.type != "cuda":
        return 0
    return int(args.vllm_gpu_memory_utilization * torch.cuda.mem_get_info(args.device)[1])


def libraries_bytes(device: torch.device) -> int:
    """Bytes held on `device` without a model: `FIRST_USE` and, on a CPU, the resident memory of this process."""
    held = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    return held + FIRST_USE.get(device.type, 0)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that this process may use on `device`; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return None
