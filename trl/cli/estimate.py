"""Memory of a run, before it is started: the heaviest optimizer step, traced on fake tensors, and what comes beside it.

See `trl.models.memory` for what is traced, and what it comes to in equations.
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
from trl.models.score import unwrap
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
"""What torch and its kernels take on their first use, whatever the model. `benchmarks/memory.py` holds the first against
measured runs; the second is a CUDA context with cuBLAS as it was measured on an H200."""

SHARDED = {"zero1": (OPTIMIZER,), "zero2": (OPTIMIZER, GRADIENTS), "zero3": (OPTIMIZER, GRADIENTS, WEIGHTS)}
SHARDED["fsdp2"] = SHARDED["zero3"]
"""What shipped configurations of accelerate divide among processes."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, at the moment when most are needed."""

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
    """Memory of `trainer`, made without weights, in its heaviest optimizer step; for what samples there, see `with_sampling`.

    `sharding` names a shipped configuration of accelerate; `quantised_bits` are those of each weight that no adapter
    trains. Images are taken for as many tokens of text: how an encoder goes through them hangs on their values.
    """
    device = trainer.args.device
    images, trainer.images, trainer.image_features = trainer.images, None, None
    libraries = libraries_bytes(device)
    config = unwrap(trainer.model).config.get_text_config(decoder=True)
    if quantised_bits is not None:
        trainer.args.cuda_graphs = False  # as of weights that are quantised when they are loaded
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
    """The `estimate` of a run, sampling included, and the plan of activations that training will make, if it makes one.

    `another()` makes the trainer once more: the first estimate takes the weights of the one that is there.
    """
    if not trainer.plans_activations():
        return with_sampling(estimate(trainer), trainer), None
    layers, second = len(checkpointable_layers(trainer.model)), another()
    trainer.args.recompute(activations=False)
    second.args.recompute(activations=True)
    kept, recomputed = estimate(trainer), estimate(second)
    there = sum(kept.parts[part] for part in (WEIGHTS, REFERENCE, LIBRARIES))
    saved = [(kept.total - recomputed.total) / layers] * layers
    plan = ActivationPlan.of(kept=kept.total - there, saved=saved, free=(kept.available or 0) - there)
    share = plan.recomputed / plan.layers
    names = {**kept.parts, **recomputed.parts}
    sizes = ((name, kept.parts.get(name, 0), recomputed.parts.get(name, 0)) for name in names)
    parts = {name: round(all_kept + share * (none - all_kept)) for name, all_kept, none in sizes}
    trainer.activation_plan = plan
    trainer._capture_layers(unwrap(trainer.model))  # trainers that sample have to see whether there is room for graphs
    return with_sampling(replace(kept, parts=parts), trainer), plan


class _Step:
    """Forward and backward of the micro-batches of a window, as the trainer plans them."""

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
            given.pop("offload", None)  # what is kept on the host is counted as if it were not
            checkpoint_activations(inner, given)
            inner.enable_input_require_grads()

    def __call__(self) -> None:
        trainer, count = self.trainer, self.trainer.args.gradient_accumulation_steps
        size = -(-len(self.examples) // count)
        rows = [list(self.examples[i : i + size]) for i in range(0, len(self.examples), size)]
        slots, _ = trainer.get_batch_samples(iter(rows), count, trainer.args.device)
        inner = unwrap(trainer.model)
        if all(captures(inner, batch.positions) for batches in slots for batch in batches):
            for parameter in trainer.model.parameters():  # graphs add to gradients that are there
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with without_graphs(inner):
            for batches in slots:
                trainer.training_step(trainer.model, [_unmasked(batch) for batch in batches], 1)


def _unmasked(batch: Batch) -> Batch:
    """The batch without what the model only looks at to find that nothing is masked: fake tensors have no values."""
    inputs = dict(batch.inputs)
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if mask is not None and mask.numel() == batch.tokens:
        del inputs["attention_mask"]
    if batch.segments is None and positions is not None and batch.last.numel() == len(positions):
        del inputs["position_ids"]
    return replace(batch, inputs=inputs)


def quantised(parts: dict[str, int], model: nn.Module, bits: int) -> dict[str, int]:
    """Weights of frozen matrices in `bits` each, with a float32 scale for every 64 of them."""
    scale = 4 / 64 if bits == 4 else 0
    frozen = [layer.weight for layer in _frozen_layers(model)]
    saved = sum(int(w.nbytes - w.numel() * (bits / 8 + scale)) for w in frozen)
    return {**parts, WEIGHTS: parts[WEIGHTS] - saved}


def _round_as_factors(trainer: BaseTrainer) -> None:
    """Frozen matrices in the type in which autocast multiplies: quantised ones are read in it, and keep no copy."""
    args = trainer.args
    if args.bf16 or args.fp16:
        for layer in _frozen_layers(trainer.model):
            layer.weight.data = layer.weight.data.to(torch.bfloat16 if args.bf16 else torch.float16)


def _frozen_layers(model: nn.Module) -> list[nn.Linear]:
    """Linear layers that are quantised where quantisation is asked for: all but the head and an adapter's."""
    head = unwrap(model).get_output_embeddings()
    linear = (module for module in unwrap(model).modules() if isinstance(module, nn.Linear))
    return [layer for layer in linear if layer is not head and not layer.weight.requires_grad]


def _divided(estimate: MemoryEstimate, sharding: str | None, processes: int, model: nn.Module) -> MemoryEstimate:
    """What each of several processes holds."""
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
    """The estimate of a trainer that samples: beside a training step where graphs keep its memory, else in turn with one."""
    if not isinstance(trainer.args, OnlineConfig):
        return estimate
    parts, inner = estimate.parts, unwrap(trainer.model)
    cache = sampling_bytes(trainer.args, inner, trainer.train_dataset)
    if not captures(inner, 0):
        if cache <= parts.get(ACTIVATIONS, 0) + parts[GRADIENTS]:
            return estimate
        parts = {**parts, ACTIVATIONS: 0, GRADIENTS: 0}
    return replace(estimate, parts={**parts, CACHE: cache})


def libraries_bytes(device: torch.device) -> int:
    """What is held on `device` without a model: on a CPU, what this process holds and torch's first use adds."""
    held = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    return held + FIRST_USE.get(device.type, 0)


def available_bytes(device: torch.device) -> int | None:
    """Memory that a process may take on `device`; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return None
