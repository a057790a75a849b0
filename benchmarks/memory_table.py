"""What training takes on a GPU by the library's own estimate, made on a CPU: tables, and a comparison with what was measured.

    python benchmarks/memory_table.py --out benchmarks/results/memory.json      # the tables of docs/gpu.md
    python benchmarks/memory_table.py --read benchmarks/results/memory.json     # the same, from what was found before
    python benchmarks/memory_table.py --measured benchmarks/results/gpu.json benchmarks/results/gpu_packed.json

Models have the shapes of public ones and no weights. A step is traced on tensors without data, as it would run on CUDA
(`as_on_cuda.py`): bfloat16 by autocast, fused AdamW, 8,192 tokens in each forward pass. LoRA has rank 16 on all linear
layers; with LoRA and QLoRA, what is frozen is in bfloat16, or in 4 bits. A comparison takes the heaviest step of those that
ran. Neither counts a CUDA context, 0.7 GiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import synthetic
from as_on_cuda import as_on_cuda
from datasets import Dataset
from gpu_workloads import GPU_WORKLOADS, SHAPES, model
from peft import LoraConfig
from report import Grid, markdown
from tqdm import tqdm
from worker import plain_layers
from workloads import COMMON, WARMUP, remainder

import trl
from trl.cli.estimate import LIBRARIES, estimate_memory, quantised, with_sampling
from trl.cli.preview import without_weights
from trl.data.encode import decode

GIB, MIB = 2**30, 2**20
QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151_936}
SIZES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": SHAPES["0.5B"],
    "Llama-3.2-1B": SHAPES["1B"],
    "Qwen2.5-3B": QWEN
    | {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "Llama-3.1-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False},
}
KINDS = ("full", "LoRA", "QLoRA")


@dataclass(frozen=True)
class Load:
    """A method and what a step of it is given."""

    about: str
    trainer: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def loads() -> dict[str, Load]:
    """8,192 tokens in a forward pass, where a prompt counts once for all its completions."""
    texts = [{"text": row["prompt"]} for row in synthetic.prompt_rows(8, seed=0, prompt=(1023, 1023))]
    pairs = synthetic.preference_rows(8, seed=0, prompt=(256, 256), completion=(383, 383))
    prompts = synthetic.prompt_rows(8, seed=0, prompt=(512, 512))
    round_ = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "num_generations": 8}
    return {
        "SFT": Load("8 rows of 1,024", "SFT", texts, {"per_device_train_batch_size": 8, "max_length": 1024}),
        "DPO": Load("8 pairs, 256 + 2 × 384", "DPO", pairs, {"per_device_train_batch_size": 8, "max_length": 1024}),
        "GRPO": Load(
            "2 of 8 prompts × 8 samples, 512 + 448",
            "GRPO",
            prompts,
            round_ | {"max_completion_length": 448, "train_sampling_strategy": "random"},
            {"reward_funcs": remainder},
        ),
    }


Parts = dict[str, int]
"""Bytes by what they are for, at the moment when most are allocated."""


def estimated(size: str, method: str, options: dict[str, Any], *, adapter: bool = False) -> dict[str, Parts]:
    """By what of the model is trained: all of it, or an `adapter`, on a model in bfloat16 and on one in 4 bits.

    Weights in 4 bits run as those in bfloat16 do.
    """
    load = loads()[method]
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    made = model(SIZES[size], seed=0, device="meta", dtype="bfloat16" if adapter else "float32")
    rows, peft_config = Dataset.from_list(load.rows), lora if adapter else None
    config = load.config | options
    more = {"model": made, "train_dataset": rows, "peft_config": peft_config, **load.arguments}
    if not adapter:
        return {"full": traced(load.trainer, config, **more)[1]}
    trainer, parts = traced(load.trainer, config, **more)
    return {"LoRA": parts, "QLoRA": quantised(parts, trainer.model, 4)}


def in_a_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function gives in a process of its own, which takes all that it held along when it ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments, **options).result()


def traced(
    trainer: str, config: dict[str, Any], *, steps: int = 0, plain: bool = False, **arguments: Any
) -> tuple[Any, Parts]:
    """A trainer of that name, and its estimate; with `steps`, for the heaviest of its first so many windows of rows.

    `plain` leaves norms and rotations as architectures write them.
    """
    fixed = {"bf16": True, "optim": "adamw_torch_fused"}
    with TemporaryDirectory() as folder, as_on_cuda(), plain_layers() if plain else nullcontext():
        options = COMMON | fixed | config | {"output_dir": folder, "max_steps": 1}
        made = without_weights(getattr(trl, f"{trainer}Trainer"))(
            args=getattr(trl, f"{trainer}Config")(**options), processing_class=synthetic.tokenizer(), **arguments
        )
        if steps:
            made.train_dataset = heaviest_rows(made, steps)
        parts = with_sampling(estimate_memory(made), made).parts
    return made, {name: size for name, size in parts.items() if name != LIBRARIES}


def heaviest_rows(trainer: Any, steps: int) -> Dataset:
    """Of the first `steps` optimizer steps that read rows in order, the rows of the one that reads most tokens."""
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    per_step //= getattr(args, "num_generations", 1)
    rows = trainer.train_dataset
    sizes = [sum(example.tokens for example in decode(row)) for row in rows]
    starts = range(0, min(steps * per_step, len(rows) - per_step + 1), per_step)
    first = max(starts, key=lambda i: sum(sizes[i : i + per_step]))
    return rows.select(range(first, first + per_step))


# ---- what was measured ----


def compared(measured: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Of every workload of `run.py --device cuda` that ran: name, MiB estimated and measured."""
    settings = measured["settings"]
    for name, found in tqdm(measured["workloads"].items(), disable=None):
        peak = max(run["peak_mib"] for run in found["runs"]["ours"])
        yield name, in_mib(in_a_process(of_workload, name, settings)), round(peak)


def in_mib(parts: Parts) -> int:
    return round(sum(parts.values()) / MIB)


def of_workload(name: str, settings: dict[str, Any]) -> Parts:
    workload = GPU_WORKLOADS[name]
    count, trainer = settings.get("warmup", WARMUP) + settings["steps"] + 1, workload.trainer.removesuffix("Trainer")
    rows = workload.rows(workload.rows_per_step * count, seed=settings["seed"])
    made = model(workload.material, seed=0, device="meta", classifies=trainer == "Reward")
    config, dataset = dict(workload.config) | settings["options"]["ours"], Dataset.from_list(rows)
    more = {"steps": count, "plain": settings.get("plain", False)} | workload.arguments()
    return traced(trainer, config, model=made, train_dataset=dataset, **more)[1]


# ---- tables ----

COLUMNS = {name: (name, True) for name in ("SFT", "DPO", "GRPO")} | {"SFT, all activations kept": ("SFT", False)}
"""Method, and whether layers are checkpointed."""

STEPS_DOWN = (
    ("all of the model, all activations kept", "full", "SFT, all activations kept"),
    ("`gradient_checkpointing=True`", "full", "SFT"),
    ("LoRA, the model in bfloat16", "LoRA", "SFT"),
    ("QLoRA, the model in 4 bits", "QLoRA", "SFT"),
)
"""Options one after the other, and where in the cells of a model they are."""


def found(size: str) -> dict[str, Any]:
    """GiB of a model's cells, `[size][kind][column]`."""
    cells: dict[str, Any] = {kind: {} for kind in KINDS}
    for adapter, (column, (method, checkpointed)) in product((False, True), COLUMNS.items()):
        options = {"gradient_checkpointing": checkpointed}
        by_kind = in_a_process(estimated, size, method, options, adapter=adapter)
        for kind, parts in by_kind.items():
            cells[kind][column] = gib(parts)
    return {"cells": {size: cells}}


def gib(parts: Parts) -> float:
    return round(sum(parts.values()) / GIB, 3)


def keep(now: dict[str, Any], file: Path) -> None:
    """Write what was found beside what the file holds; models stand in the order of `SIZES`."""
    before = json.loads(file.read_text()) if file.exists() else {}
    cells = before.get("cells", {}) | now.get("cells", {})
    result = {**before, **now, "cells": {size: cells[size] for size in SIZES if size in cells}}
    file.write_text(json.dumps(result, indent=1) + "\n")


def tables(result: dict[str, Any]) -> list[Grid]:
    """The tables of docs/gpu.md."""
    cells = result["cells"]
    by_model = [
        [size, kind, *(f"{cells[size][kind][column]:.1f}" for column in COLUMNS)]
        for size, kind in product(cells, KINDS)
    ]
    saved = [[label, *(f"{cells[size][kind][column]:.1f}" for size in cells)] for label, kind, column in STEPS_DOWN]
    ratios = [
        [name, f"{guess:,}", f"{peak:,}", f"{guess / peak:.2f}"] for name, guess, peak in result.get("compared", [])
    ]
    return [
        Grid("GiB", ["model", "trained", *COLUMNS], by_model),
        Grid("GiB of SFT, one option after the other", ["", *cells], saved),
        Grid("MiB allocated at the peak", ["workload", "estimated", "measured", "ratio"], ratios),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("memory.json"), help="what is there already is kept")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="models to trace")
    parser.add_argument("--read", type=Path, help="print the tables of earlier runs")
    parser.add_argument("--measured", type=Path, nargs="+", help="compare with what `run.py --device cuda` wrote")
    parser.add_argument("--workload", choices=list(GPU_WORKLOADS), help="print the estimate of one workload of run.py")
    parser.add_argument("--options", type=json.loads, default={}, help="config fields of it to change, as JSON")
    options = parser.parse_args()
    if options.workload:
        parts = of_workload(options.workload, {"steps": 4, "seed": 0, "options": {"ours": options.options}})
        print(", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items()), f"together {gib(parts):.1f} GiB")
        return
    if options.measured:
        files = (json.loads(file.read_text()) for file in options.measured)
        keep({"compared": [row for file in files for row in compared(file)]}, options.out)
    for size in tqdm([] if options.read or options.measured else options.sizes, disable=None):
        keep(found(size), options.out)
    print(*map(markdown, tables(json.loads((options.read or options.out).read_text()))), sep="\n\n")


if __name__ == "__main__":
    main()
