"""`trl check` for diffusion methods: rows, plan, memory, and a test call of the reward functions.

Weights are not loaded: the pipeline's modules are built from their configurations on the "meta" device.
"""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from trl.cli.check import ask_rewards, print_table, print_verdict
from trl.cli.commands import load
from trl.cli.train import Run, datasets_of, own_keywords
from trl.counts import size_of
from trl.data.places import naming_lines
from trl.diffusion.denoiser import Denoiser
from trl.diffusion.families import denoiser_for
from trl.diffusion.pipelines import add_adapter, trained
from trl.errors import ConfigError
from trl.imports import require
from trl.models.config import get_peft_config

ROWS_SHOWN = 3
STATES = 2
"""Optimizer states of AdamW per trained parameter, in float32: the two moments."""


def check(run: Run, *, rows: int = ROWS_SHOWN) -> int:
    """Print the plan, memory and problems of a run, and `rows` prompts. Return 1 if there are problems, else 0."""
    from trl.cli.help import console

    out = console()
    dataset, evaluated = datasets_of(run)
    with naming_lines(run.script, run.mixture):
        for name, split in {"train": dataset, "eval": evaluated}.items():
            if split is not None:
                load(run.method.trainer).check_rows(split, name, run.training)
    denoiser = denoiser_without_weights(run)
    print_table(out, "Rows", rows_of(dataset, rows))
    print_table(out, "Plan", plan_of(run, denoiser, dataset))
    parts = memory_of(run, denoiser)
    free = free_memory()
    total = sum(parts.values())
    shown = {name: size_of(count) for name, count in parts.items() if count}
    print_table(out, "Memory", {**shown, "together": size_of(total), "free now": size_of(free)})
    problems = (
        [] if total < free else [f"Memory: a step takes about {size_of(total)}, but only {size_of(free)} are free."]
    )
    if run.extra:
        found, wrong = try_rewards(run, denoiser, dataset)
        print_table(out, "Rewards of a grey picture", found)
        problems += wrong
    return print_verdict(out, problems)


# ---- the pipeline ----


def denoiser_without_weights(run: Run) -> Denoiser:
    """The denoiser of a run's pipeline on the "meta" device, with a LoRA adapter if the options ask for one."""
    args = run.training
    pipeline = pipeline_without_weights(run.model.model_name_or_path)
    denoiser = denoiser_for(
        pipeline,
        height=args.height,
        width=args.width,
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
        flow_solver=args.flow_solver,
    )
    with torch.device("meta"):
        add_adapter(denoiser.module, get_peft_config(run.model), denoiser.part)
    return denoiser


def pipeline_without_weights(name: str) -> Any:
    """The pipeline `name` (Hub name or folder), its modules on the "meta" device. Raises ConfigError if there is
    none."""
    diffusers = require("diffusers", to="Training a diffusion model")
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    try:
        index = diffusers.DiffusionPipeline.load_config(name)
    except OSError as error:
        raise ConfigError(f"model_name_or_path={name!r} holds no diffusers pipeline: {error}") from error
    kind = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = {}
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list | tuple):
            continue
        library, class_name = value
        parts[part] = None
        if library in libraries and part not in ("safety_checker", "feature_extractor"):
            parts[part] = _without_weights(getattr(libraries[library], class_name), name, part)
    options = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
    return kind(**parts, **options)


def _without_weights(kind: type, name: str, part: str) -> Any:
    """A component of a pipeline: modules on the "meta" device, others (tokenizer, scheduler) loaded as usual."""
    from transformers import PreTrainedModel

    if issubclass(kind, PreTrainedModel):
        config = kind.config_class.from_pretrained(name, subfolder=part)
        with torch.device("meta"):
            return kind(config)
    if issubclass(kind, nn.Module):
        with torch.device("meta"):
            return kind.from_config(kind.load_config(name, subfolder=part))
    return kind.from_pretrained(name, subfolder=part)


# ---- what is shown ----


def rows_of(rows: Any, count: int) -> dict[str, str]:
    """The first `count` prompts, and how many rows there are."""
    from trl.data.encode import first_rows

    prompts = {f"prompt {i + 1}": str(row.get("prompt"))[:100] for i, row in enumerate(first_rows(rows, count))}
    size = {"rows": f"{len(rows):,}"} if hasattr(rows, "__len__") else {"rows": "a stream"}
    return size | prompts


def plan_of(run: Run, denoiser: Denoiser, rows: Any) -> dict[str, str]:
    """The plan to print: pictures per optimizer step, denoising steps, and the number of optimizer steps."""
    args, processes = run.training, run.launch.num_processes or run.training.world_size
    together = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    plan = {"pictures": f"{denoiser.width} × {denoiser.height} pixels, latents {tuple(denoiser.latent_shape)}"}
    if not hasattr(args, "num_generations"):
        per_epoch = together
        plan["pairs per step"] = f"{together:,}"
    else:
        prompts = args.prompts_per_rollout_batch * processes
        steps = args.minibatches_per_rollout_batch * args.num_iterations / args.gradient_accumulation_steps
        plan["pictures per rollout batch"] = (
            f"{prompts * args.num_generations:,} = {prompts:,} × {args.num_generations:,}"
        )
        plan["optimizer steps per rollout batch"] = f"{steps:g}"
        trained_on = getattr(args, "noise_levels", args.num_inference_steps)
        plan["denoising steps per optimizer step"] = f"{together * trained_on:,}"
        per_epoch = prompts / steps
    plan["rows of a forward pass"] = f"{forward_rows(run, denoiser):,} at most"
    if args.max_steps > 0:
        plan["optimizer steps"] = f"{args.max_steps:,}"
    elif hasattr(rows, "__len__"):
        plan["optimizer steps"] = f"{math.ceil(len(rows) / per_epoch * args.num_train_epochs):,}"
    return plan


def forward_rows(run: Run, denoiser: Denoiser) -> int:
    """Latents per forward pass of the denoiser: `forward_rows`, doubled by classifier-free guidance in training."""
    both = denoiser.is_guided and hasattr(run.training, "num_generations") and not hasattr(run.training, "noise_levels")
    return run.training.forward_rows * (2 if both else 1)


def memory_of(run: Run, denoiser: Denoiser) -> dict[str, int]:
    """Peak bytes of an optimizer step by category: weights, gradients, optimizer states, …"""
    pipeline, module = denoiser.pipeline, denoiser.module
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    width = {"float16": 2, "bfloat16": 2}.get(run.model.dtype, 4)
    weights = sum(p.numel() for part in modules for p in part.parameters()) * width
    own = sum(p.numel() for p in trained(module).values())
    has_reference = bool(getattr(run.training, "beta", 0)) and not run.model.use_peft
    copies = (getattr(run.training, "ema_decay", None) is not None) + hasattr(run.training, "nft_beta")
    activations = activation_bytes(denoiser, forward_rows(run, denoiser))
    return {
        "weights": weights,
        "gradients": own * 4,
        "optimizer": own * 4 * STATES,
        "reference": sum(p.numel() for p in module.parameters()) * width if has_reference else 0,
        "copies of trained weights": own * 4 * copies,
        "activations": activations // (2 if run.training.bf16 or run.training.fp16 else 1),
    }


def activation_bytes(denoiser: Denoiser, rows: int) -> int:
    """Bytes of float32 activations that a forward pass of `rows` saves for backward, traced with one row on "meta"."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage()._cdata for p in denoiser.module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        latents = torch.zeros(1, *denoiser.latent_shape)
        texts = {name: torch.zeros(1, *shape) for name, shape in denoiser.text_shapes().items()}
        output = denoiser.forward(denoiser.module, latents, torch.zeros(1), texts)
        del output
    return sum(kept.values()) * rows


def free_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def try_rewards(run: Run, denoiser: Denoiser, rows: Any) -> tuple[dict[str, str], list[str]]:
    """Call every reward function on a grey picture for the first prompt; return rewards by name, and the problems."""
    from trl.rewards.pictures import PictureSamples, make_picture_rewards

    row = next(iter(rows))
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    rewards = make_picture_rewards(own_keywords(run)["reward_funcs"], weights=None, columns=list(columns))
    images = torch.full((1, 3, denoiser.height, denoiser.width), 0.5)
    return ask_rewards(rewards, lambda reward: PictureSamples.of([row["prompt"]], images, [reward], columns, {}))
