"""`trl check METHOD …`, or `trl METHOD … --dry_run`: show what a training command would do, without training.

Shows rows as the model would see them, counts of truncated and dropped rows, the planned optimizer steps, and an
estimate of memory; calls each reward function once. Problems are listed last, and make the exit status 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from trl.cli.commands import Method, load
from trl.cli.parser import ParsedOptions
from trl.cli.train import (
    Run,
    check_hub,
    check_trains,
    check_weights,
    datasets_of,
    library_errors_as_config_errors,
    read_run,
)
from trl.counts import counted, size_of
from trl.errors import ConfigError, DataError, TrlError
from trl.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from trl.cli.estimate import MemoryEstimate
    from trl.rewards.reward import Reward, Samples
    from trl.trainers.base import BaseTrainer

IMAGES_OF_ROWS = 100
"""Number of rows whose images are decoded as a test."""
CHATS = {"messages", "conversations", "conversation"}
"""Columns of conversations."""

ROWS_READ = 1000
"""Number of rows that are encoded; lengths and counts are measured on these."""


@dataclass
class CheckArguments:
    """Options of `trl check` itself, beside those of the training command."""

    rows: int = 2
    """How many rows to show."""

    def __post_init__(self) -> None:
        if not 0 <= self.rows <= ROWS_READ:
            raise ConfigError(f"rows={self.rows}: give 0 to {ROWS_READ:,}.")


def run(arguments: CheckArguments, given: ParsedOptions, method: Method) -> int:
    return load(method.check)(read_run(method, given), rows=arguments.rows)


def check(run: Run, *, rows: int = CheckArguments.rows) -> int:
    """Print `rows` rows as the model sees them, and the plan, memory and problems of a run.

    Return 1 if there are problems, else 0.
    """
    from trl.cli.estimate import planned
    from trl.cli.help import console
    from trl.data.encode import first_rows

    out = console()
    check_hub(run)
    check_trains(run)
    dataset, evaluated = datasets_of(run)
    sample = first_rows(dataset, ROWS_READ)
    make = partial(trainer_of, run, sample, None if evaluated is None else first_rows(evaluated, ROWS_READ))
    with library_errors_as_config_errors():
        trainer = make()
    if rows:
        trainer.preview(rows)
    reads_images = trainer.images is not None
    estimate, activations = planned(trainer, make, partial(estimate_of, run))
    plan = plan_of(trainer, dataset, sample, estimate.processes)
    print_table(out, "Plan", plan if activations is None else {**plan, "activations": activations.what})
    print_table(out, f"Memory of {'each' if estimate.processes > 1 else 'the'} process", table_of(estimate))
    if reads_images:
        out.print("  The activations of the image encoder are not included.")
    problems = [*weights_problems(run), *memory_problems(estimate, run)]
    problems += image_problems(trainer) if reads_images else []
    if is_online(trainer.args):
        found, wrong = try_rewards(trainer, sample)
        print_table(out, "Rewards of a trial", found)
        problems += wrong
    return print_verdict(out, problems)


def trainer_of(run: Run, rows: Any, evaluated: Any = None) -> BaseTrainer:
    """The trainer of a run, on a model without weights, with training rows `rows` and evaluation rows `evaluated`."""
    from trl.cli.preview import trainer_without_weights
    from trl.models.config import get_peft_config

    return trainer_without_weights(run, rows, peft_config=get_peft_config(run.model), eval_dataset=evaluated)


def estimate_of(run: Run, trainer: BaseTrainer) -> MemoryEstimate:
    """Estimate the memory of a run whose trainer was made by `trainer_of`."""
    from trl.cli.estimate import estimate_memory

    bits = 4 if run.model.load_in_4bit else 8 if run.model.load_in_8bit else None
    processes = run.launch.num_processes or trainer.args.world_size
    return estimate_memory(trainer, sharding=run.launch.accelerate_config, processes=processes, quantised_bits=bits)


def image_problems(trainer: BaseTrainer) -> list[str]:
    """The first image that cannot be decoded. Encoding reads only the headers of images, so this decodes them."""
    from trl.data.encode import first_rows
    from trl.data.multimodal import IMAGES

    try:
        for row in first_rows(trainer.train_dataset, IMAGES_OF_ROWS):
            trainer.images.read(row.get(IMAGES) or ())
    except DataError as error:
        return [f"Images: {error}"]
    return []


# ---- the plan ----


def plan_of(trainer: BaseTrainer, rows: Any, sample: Any, processes: int) -> dict[str, str]:
    """The plan to print: rows and tokens per optimizer step, and the number of steps."""
    from datasets import Dataset

    from trl.data.encode import decode

    args = trainer.args
    sizes = [
        sum(example.tokens for example in decode(row)) for row in trainer.train_dataset
    ]  # packed rows have several examples, others one
    is_whole = isinstance(rows, Dataset) and len(rows) == len(sample)
    if is_online(args):
        plan, per_step = _rollouts(args, sizes, processes)
    else:
        plan, per_step = _windows(args, sizes, processes, most=len(sizes) if is_whole else None)
    if budget := trainer.micro_batch_budget():
        plan["tokens per forward pass"] = f"{budget:,} at most (max_tokens_per_micro_batch)"
    if trains_all_turns(trainer, sample):
        plan["trained on"] = "all turns; with --assistant_only_loss, those of the assistant alone"
    return plan | _steps(args, len(sizes) / per_step, rows, sample)


def trains_all_turns(trainer: BaseTrainer, sample: Any) -> bool:
    """Whether conversations are trained on as a whole, which surprises people who mean to teach answers."""
    from trl.data.examples import columns_of

    options, is_chat = vars(trainer.args), CHATS & set(columns_of(sample))
    is_whole = trainer.encoded["train"].kind == "language_modeling" and not options.get("assistant_only_loss", True)
    return bool(is_chat and is_whole)


def is_online(args: Any) -> bool:
    """Whether a method trains on completions that it samples."""
    return "num_generations" in vars(args)


def _windows(args: Any, sizes: Sequence[int], processes: int, *, most: int | None) -> tuple[dict[str, str], float]:
    """The plan of rows and tokens per optimizer step, and the number of rows per step.

    `sizes` are the tokens of each row, `most` is the number of rows in the dataset, if known.
    """
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    mean = sum(sizes) / len(sizes)
    taken = per_step if most is None else min(per_step, most)
    return {
        "rows per step": f"{per_step:,} = {args.per_device_train_batch_size:,} per micro-batch × "
        f"{args.gradient_accumulation_steps:,} accumulated × {counted(processes, 'process')}",
        "tokens per step": f"{taken * max(sizes):,} at most, {taken * mean:,.0f} on average",
    }, per_step


def _rollouts(args: Any, sizes: Sequence[int], processes: int) -> tuple[dict[str, str], float]:
    """The plan of completions and tokens per rollout batch, and the number of prompts per optimizer step.

    `sizes` are the tokens of each prompt.
    """
    prompts, samples = args.prompts_per_rollout_batch * processes, args.num_generations
    steps = args.minibatches_per_rollout_batch * args.num_iterations / args.gradient_accumulation_steps
    sampled = args.max_completion_length or 0
    return {
        "completions per rollout batch": f"{prompts * samples:,} = {counted(args.prompts_per_rollout_batch, 'prompt')} × "
        f"{counted(samples, 'sample')} × {counted(processes, 'process')}",
        "optimizer steps per rollout batch": f"{steps:g}",
        "tokens per rollout batch": f"{prompts * samples * (max(sizes) + sampled):,} at most",
    }, prompts / steps


def _steps(args: Any, steps: float, rows: Any, sample: Any) -> dict[str, str]:
    """The number of optimizer steps, extrapolated from the `steps` that the rows of `sample` take to all `rows`."""
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        return {"optimizer steps": f"{args.max_steps:,}, from a stream"}
    per_epoch = max(1, math.ceil(steps * len(rows) / len(sample)))
    about = "about " if len(rows) > len(sample) else ""
    if args.max_steps > 0:
        return {
            "optimizer steps": f"{args.max_steps:,}, {about}{args.max_steps / per_epoch:.2g} epochs of {per_epoch:,}"
        }
    total = math.ceil(per_epoch * args.num_train_epochs)
    return {
        "optimizer steps": f"{about}{total:,} = {args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)} of {per_epoch:,}"
    }


# ---- memory ----


def table_of(estimate: MemoryEstimate) -> dict[str, str]:
    rows = {name: size_of(count) for name, count in estimate.parts.items() if count}
    rows["together"] = size_of(estimate.total)
    if estimate.available is not None:
        rows["free now"] = size_of(estimate.available)
    width = max(map(len, rows.values()))
    rows = {name: size.rjust(width) for name, size in rows.items()}
    if estimate.device == "cpu":
        rows["together"] += (
            "   The process may hold up to twice this, because of fragmentation in the memory allocator."
        )
    return rows


def memory_problems(estimate: MemoryEstimate, run: Run) -> list[str]:
    if estimate.fits:
        return []
    needed, free = size_of(estimate.total), size_of(estimate.available)
    return [
        "\n    ".join(
            [f"Memory: a step takes {needed}, but only {free} are free. To save memory:", *remedies(estimate, run)]
        )
    ]


def remedies(estimate: MemoryEstimate, run: Run) -> list[str]:
    """Options that reduce memory, the one that saves most first."""
    parts, training = estimate.parts, run.training
    saved = {}
    if not training.gradient_checkpointing:
        saved["--gradient_checkpointing recomputes activations in the backward pass."] = 0.8 * parts["activations"]
    if not run.model.use_peft:
        saved["--use_peft trains a LoRA adapter: the base model needs no gradients and optimizer states."] = (
            parts["gradients"] + parts["optimizer"]
        )
    elif not (run.model.load_in_4bit or run.model.load_in_8bit):
        saved["--load_in_4bit keeps the frozen weights in 4 bits."] = 0.8 * parts["weights"]
    if run.model.dtype == "float32":
        saved["--dtype bfloat16 halves weights, gradients and optimizer states."] = 0.5 * parts["weights"]
    if training.per_device_train_batch_size > 1:
        smaller = training.per_device_train_batch_size // 2
        accumulated = training.gradient_accumulation_steps * 2
        saved[
            f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps {accumulated} is the same optimizer "
            "step in more forward passes."
        ] = 0.5 * parts["activations"]
    if length := getattr(training, "max_length", None):
        saved[f"--max_length {length // 2} truncates longer rows."] = 0.4 * parts["activations"]
    return sorted(saved, key=lambda remedy: -saved[remedy])


# ---- what may be wrong ----


def weights_problems(run: Run) -> list[str]:
    """A problem if the folder of the model holds no weights."""
    try:
        check_weights(run.model.model_name_or_path)
    except ConfigError as error:
        return [f"Model: {error}"]
    return []


def try_rewards(trainer: BaseTrainer, sample: Any) -> tuple[dict[str, str], list[str]]:
    """Call every reward function on a made-up answer to the first prompt; return rewards by name, and the problems."""
    from trl.data.multimodal import images_of
    from trl.rewards.reward import Samples

    row = next(iter(sample))
    answer = (
        "This is an answer."
        if isinstance(row["prompt"], str)
        else [{"role": "assistant", "content": "This is an answer."}]
    )
    columns = {name: [value] for name, value in row.items() if name not in ("prompt", "completion")}
    if trainer.images is not None:
        columns["images"] = [trainer.images.read(images_of(row))]
    extras = {"trainer_state": trainer.state, "completion_ids": [trainer.tokenizer("This is an answer.")["input_ids"]]}
    return ask_rewards(trainer.rewards, lambda _: Samples([row["prompt"]], [answer], columns, extras))


def ask_rewards(
    rewards: Sequence[Reward], samples_for: Callable[[Reward], Samples]
) -> tuple[dict[str, str], list[str]]:
    """Call every reward function on one sample. Return the rewards by name, and the problems."""
    from trl.rewards.call import call_rewards

    found, wrong = {}, []
    for reward in rewards:
        try:
            found[reward.name] = f"{call_rewards([reward], samples_for(reward)).values.item():g}"
        except TrlError as error:
            found[reward.name] = "failed"
            wrong.append(f"Reward: {error}")
    return found, wrong


# ---- on the screen ----


def print_table(out: Console, title: str, rows: Mapping[str, str]) -> None:
    from trl.cli.help import print_rows

    print_rows(out, title, [(printable(name), printable(text)) for name, text in rows.items()])


def print_verdict(out: Console, problems: Sequence[str]) -> int:
    from rich.text import Text

    out.print()
    if not problems:
        out.print(Text("Ready to train.", style="bold green"))
    for problem in problems:
        out.print(Text(f"✗ {printable(problem)}", style="bold red"))
    return int(bool(problems))
