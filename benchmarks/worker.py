"""Run one side of one workload in this process and write what was measured as JSON.

The interpreter decides which `trl` is imported, ours or TRL's, so this file imports nothing that only one of them has.
A timed step lasts from the end of the step before it to its own end: fetching and laying out the batch, forward,
backward, optimizer and logging are all in it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from gpu_workloads import GPU_WORKLOADS, OPTIONS, SHAPES, tiny
from gpu_workloads import model as random_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from workloads import COMMON, WARMUP, WORKLOADS, Workload

REPOSITORY = Path(__file__).resolve().parent.parent
LOADERS = {
    "policy": AutoModelForCausalLM,
    "reward": AutoModelForSequenceClassification,
    "sampler": AutoModelForCausalLM,
}
EVERY = WORKLOADS | GPU_WORKLOADS
PROFILED = 1
"""Steps after the timed ones in which launches are counted, on CUDA."""

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers")


@dataclass
class Recorder:
    """What one run measured, per timed step; memory in MiB, times in seconds.

    cpu_seconds     processor time of all threads in those steps: far below time × threads, the machine was shared
    tokens          not padding, that went through the policy with gradient (a prompt laid out once counts once)
    positions       the same with padding
    sampled         tokens that the step sampled, the end token included; `sampling_seconds` is what that took
    prepare_seconds loading the trainer with its data: encoding, packing, a reference model
    loaded_mib      resident once that is done; `peak_mib` is the largest the process ever was. On CUDA: what was allocated
                    there, at the most in a timed step
    launches        kernels and copies of a step, on CUDA; `busy` is the part of it in which the device ran one. Those of a
                    CUDA graph count each
    graphs          bytes that CUDA graphs kept after the last step
    """

    step_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    sampling_seconds: list[float] = field(default_factory=list)
    prepare_seconds: float = 0.0
    loaded_mib: float = 0.0
    peak_mib: float = 0.0
    parameters: int = 0
    launches: float | None = None
    busy: float | None = None
    graphs: int = 0

    def prepared(self, model: torch.nn.Module, started: float, device: str = "cpu") -> None:
        """Note what making a trainer since `started` took, and what it holds."""
        self.prepare_seconds = time.perf_counter() - started
        self.parameters = sum(p.numel() for p in model.parameters())
        self.loaded_mib = memory_mib("VmRSS", device)

    def see_memory(self, *, counts: bool) -> None:
        """Note the most that a step on a GPU held: what was allocated, and all that CUDA graphs keep for their replays.

        While a graph is captured, its memory is allocated.
        """
        held, graphs = torch.cuda.max_memory_allocated(), of_graphs()
        captured, self.graphs = graphs != self.graphs, graphs
        if counts:
            self.peak_mib = max(self.peak_mib, (held if captured else held + graphs) / 2**20)
        torch.cuda.reset_peak_memory_stats()

    def result(self, side: str) -> dict[str, Any]:
        """What was measured, with the versions of what `side` ran."""
        return {"versions": versions(side)} | asdict(self)


class Clock(TrainerCallback):
    """Stamps the end of every step and keeps its loss and gradient norm."""

    def __init__(
        self, recorder: Recorder, counter: Counter, *, counts_itself: bool, last: int, first: int = WARMUP
    ) -> None:
        self.recorder, self.counter, self.counts_itself = recorder, counter, counts_itself
        self.first, self.last = first, last
        self.before = self.cpu_before = 0.0
        self.seen = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, cpu_now = time.perf_counter(), time.process_time()
        if self.first < state.global_step <= self.last:
            self.recorder.step_seconds.append(now - self.before)
            self.recorder.cpu_seconds.append(cpu_now - self.cpu_before)
            counted = state.num_input_tokens_seen - self.seen
            self.recorder.tokens.append(counted if self.counts_itself else self.counter.tokens)
            self.recorder.positions.append(self.counter.positions)
            self.recorder.sampled.append(self.counter.sampled)
            self.recorder.sampling_seconds.append(self.counter.sampling_seconds)
        if torch.cuda.is_initialized():
            self.recorder.see_memory(counts=self.first < state.global_step <= self.last)
        self.counter.clear()
        self.seen = state.num_input_tokens_seen
        self.before, self.cpu_before = time.perf_counter(), time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs and state.global_step > self.first:
            self.recorder.losses.append(float(logs["loss"]))
            self.recorder.gradient_norms.append(float(logs["grad_norm"]))


class Counter:
    """Counts the tokens that enter a model's embedding while gradients are on, and those that a reward is asked about.

    Takes the time of functions that sample.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad
        self.clear()

    def clear(self) -> None:
        self.tokens = self.positions = self.sampled = 0
        self.sampling_seconds = 0.0

    def watch(self, embedding: torch.nn.Module) -> None:
        embedding.register_forward_pre_hook(self._count)

    def watch_batches(self, trainer: Trainer) -> None:
        """Count the positions of our trainer's batches, without a hook, which would keep its layers from being replayed."""
        plain = trainer.training_step

        def counted(model: torch.nn.Module, batches: Any, *rest: Any) -> torch.Tensor:
            self.positions += sum(batch.positions for batch in batches)
            return plain(model, batches, *rest)

        trainer.training_step = counted

    def _count(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            (ids,) = arguments
            self.tokens += int((ids != self.pad).sum())
            self.positions += ids.numel()

    def counted(self, reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
        """The reward function, with its completions counted."""

        @wraps(reward)
        def counted(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            self.sampled += sum(map(len, completion_ids))
            return reward(completion_ids=completion_ids, **columns)

        return counted

    def timed(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted."""

        @wraps(sample)
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = sample(*arguments, **options)
            self.sampling_seconds += time.perf_counter() - started
            return found

        return timed


class Profile(TrainerCallback):
    """Counts what the device did in the steps after step `first`, and how long it did something."""

    def __init__(self, recorder: Recorder, first: int) -> None:
        self.recorder, self.first = recorder, first
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.first:
            self.started = time.perf_counter()
            self.profiler.start()
        elif state.global_step == self.first + PROFILED:
            torch.cuda.synchronize()
            elapsed = time.perf_counter() - self.started
            self.profiler.stop()
            events = [e for e in self.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            self.recorder.launches = len(events) / PROFILED
            self.recorder.busy = covered([(e.time_range.start, e.time_range.end) for e in events]) / 1e6 / elapsed


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def memory_mib(name: str, device: str = "cpu") -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process, as Linux counts them."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def of_graphs() -> int:
    """Bytes that CUDA graphs keep for their next replay, which PyTorch does not count as allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def library_trainer(workload: Workload, options: dict[str, Any], parts: dict[str, Any]) -> Trainer:
    """The workload's trainer from whichever `trl` this interpreter has."""
    trl = importlib.import_module("trl")
    config = getattr(trl, workload.config_class)(**options)
    return getattr(trl, workload.trainer)(args=config, **parts)


def plain_trainer(workload: Workload, options: dict[str, Any], parts: dict[str, Any]) -> Trainer:
    """`transformers.Trainer` as its users write it: chats tokenised beforehand, padded to the longest, every token trained."""
    tokenizer, longest = parts["processing_class"], options.pop("max_length")
    rows = parts.pop("train_dataset").map(
        lambda row: tokenizer.apply_chat_template(
            row["messages"], truncation=True, max_length=longest, return_dict=True
        ),
        remove_columns=["messages"],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(args=TrainingArguments(**options), train_dataset=rows, data_collator=collator, **parts)


def counted_trainer(
    side: str, workload: Workload, options: dict[str, Any], parts: dict[str, Any], counter: Counter
) -> Trainer:
    """The side's trainer; where it samples, what its rewards are asked about is counted, and sampling timed."""
    samples = "reward_funcs" in parts
    if samples:
        parts["reward_funcs"] = counter.counted(parts["reward_funcs"])
    trainer = BUILDERS[side](workload, options, parts)
    if samples:
        sampler = trainer.engine if side == "ours" else parts["model"]
        sampler.generate = counter.timed(sampler.generate)
    return trainer


BUILDERS = {"ours": library_trainer, "trl": library_trainer, "transformers": plain_trainer}


def measure(
    workload: Workload,
    *,
    side: str,
    directory: Path,
    steps: int,
    warmup: int,
    seed: int,
    overrides: dict[str, Any],
    device: str,
) -> Recorder:
    recorder, random_weights = Recorder(), workload.material in SHAPES
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if random_weights:
        model = random_model(
            workload.material, seed=seed, device=device, classifies=workload.trainer == "RewardTrainer"
        )
    else:
        model = LOADERS[workload.material].from_pretrained(directory / workload.material, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory / ("policy" if random_weights else workload.material))
    profiled = PROFILED if device == "cuda" else 0
    options = COMMON | OPTIONS[device] | workload.config | overrides
    last = warmup + steps
    options |= {"output_dir": str(directory / "out"), "max_steps": last + profiled, "seed": seed}

    started = time.perf_counter()
    rows = Dataset.from_list(workload.read_rows(directory))
    parts = {"model": model, "train_dataset": rows, "processing_class": tokenizer} | workload.arguments()
    counter = Counter(tokenizer.pad_token_id)
    if side == "trl" and random_weights and workload.trainer in ("DPOTrainer", "KTOTrainer"):
        parts["ref_model"] = copy.deepcopy(model)  # TRL makes its own by loading the model's name, which this one lacks
    trainer = counted_trainer(side, workload, options, parts, counter)
    recorder.prepared(model, started, device)

    if side == "ours":
        counter.watch_batches(trainer)
    else:
        counter.watch(model.get_input_embeddings())
    # Our rows are not filled up with the padding token: the trainer says how many tokens there were.
    trainer.add_callback(Clock(recorder, counter, counts_itself=side == "ours", last=last, first=warmup))
    if profiled:
        trainer.add_callback(Profile(recorder, last))
    trainer.train()
    if device == "cpu":
        recorder.peak_mib = memory_mib("VmHWM")
    return recorder


def versions(side: str) -> dict[str, str]:
    """Versions of what this side ran; refuses to measure ourselves in TRL's place."""
    found = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    if side == "transformers":
        return found
    trl = importlib.import_module("trl")
    if side == "trl" and Path(trl.__file__).is_relative_to(REPOSITORY):
        raise SystemExit("This interpreter's `trl` is this repository: give --trl-python one that has TRL installed.")
    return found | {"trl": version("trl")}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=BUILDERS, required=True)
    parser.add_argument("--workload", choices=EVERY, required=True)
    parser.add_argument("--dir", type=Path, required=True, help="where run.py saved models and rows")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=WARMUP, help="steps before those")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="config fields to change, as JSON")
    parser.add_argument("--device", choices=OPTIONS, default="cpu")
    parser.add_argument("--tiny", action="store_true", help="the smallest model in place of the workload's")
    parser.add_argument("--plain", action="store_true", help="ours: norms and rotations as architectures write them")
    parser.add_argument("--out", type=Path, help="where a worker that does not stand by writes what it measured")
    return parser


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one run measured, with the versions of what it ran."""
    versions(arguments.side)  # refuses, before anything is made
    workload = EVERY[arguments.workload]
    with plain_layers() if arguments.plain else nullcontext():
        recorder = measure(
            tiny(workload) if arguments.tiny else workload,
            side=arguments.side,
            directory=arguments.dir,
            steps=arguments.steps,
            warmup=arguments.warmup,
            seed=arguments.seed,
            overrides=arguments.options,
            device=arguments.device,
        )
    return recorder.result(arguments.side)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Our trainers leave norms and rotations as architectures write them."""
    with patch.object(importlib.import_module("trl.trainers.base").BaseTrainer, "_fuses", lambda self: False):
        yield


def serve() -> None:
    """Run what lines of the standard input ask for, each a list of this program's arguments, and never end by an error.

    Answers are lines of the standard output. What libraries print goes to the standard error.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        try:
            found = run(parser().parse_args(json.loads(line)))
        except Exception:
            found = {"failed": traceback.format_exc()}
        print(json.dumps(found), file=answers, flush=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    if sys.argv[1:] == ["--serve"]:
        serve()
        return
    arguments = parser().parse_args()
    arguments.out.write_text(json.dumps(run(arguments)))


if __name__ == "__main__":
    main()
