"""What the model writes at every evaluation, for methods that do not sample in training.

The prompts are those of the first evaluation rows; of a row without one (a text, a dialogue), what stands before the last
part that is trained on. Completions are the most likely ones, so that those of two evaluations differ by training alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from trl.callbacks.completions import write_completions
from trl.errors import ConfigError
from trl.models.score import unwrap
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Example

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer

OPENING = 8
"""Tokens of a text that are given, where it is trained on from its beginning."""


@dataclass
class EvalSamplesOptions:
    """Options of trainers that learn from rows and not from samples."""

    eval_samples: int = 0
    """Evaluation rows whose prompts the model continues at every evaluation: for the terminal, the report, wandb and trackio."""

    eval_samples_max_new_tokens: int = 64
    """Tokens of such a sample, at most."""


class EvalSamplesCallback(TrainerCallback):
    """Samples at every evaluation. All processes sample, as sharded weights ask for; one writes."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer
        self.engine = LocalEngine(trainer.model, trainer.tokenizer, progress=False)
        self.sampled_at: int | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == self.sampled_at:  # another set of the same evaluation
            return
        self.sampled_at = state.global_step
        trainer, params = self.trainer, SamplingParams(temperature=0, max_new_tokens=args.eval_samples_max_new_tokens)
        prompts = [prompt_of(example) for example in first_examples(trainer, args.eval_samples)]
        self.engine.sync(trainer.model, state.global_step)
        sampled = self.engine.generate(prompts, params)
        if state.is_world_process_zero:
            decode = trainer.tokenizer.decode
            rows = [
                {"prompt": decode(list(prompt.ids)), "completion": decode(list(rollout.ids), skip_special_tokens=True)}
                for prompt, (rollout,) in zip(prompts, sampled, strict=True)
            ]
            folder = Path(args.output_dir) / "completions"
            write_completions(rows, folder, state.global_step, trackers=args.report_to)


def first_examples(trainer: BaseTrainer, n: int) -> Sequence[Example]:
    """Of the first n evaluation rows; of several sets, those of the first."""
    rows = trainer.eval_dataset
    rows = next(iter(rows.values())) if isinstance(rows, Mapping) else rows
    return [] if rows is None else trainer.to_examples(list(islice(rows, n)))[:n]


def prompt_of(example: Example) -> Prompt:
    """What is given to the model of an example."""
    if example.prompt:
        return Prompt.of(example)
    (completion,) = example.completions
    mask = [1] * len(completion) if completion.mask is None else list(completion.mask)
    starts = [t for t in range(1, len(mask)) if mask[t] and not mask[t - 1]]
    end = starts[-1] if starts else min(OPENING, (len(mask) + 1) // 2)
    return Prompt(list(completion.ids)[:end], example.inputs)


def add_eval_samples(trainer: BaseTrainer) -> None:
    """Have the trainer sample at its evaluations, where it is asked to. Raises ConfigError for a model that cannot."""
    if trainer.args.eval_samples:
        if trainer.eval_dataset is None:
            raise ConfigError("eval_samples asks for samples of evaluation rows: give eval_dataset as well.")
        if unwrap(trainer.model).config.is_encoder_decoder and not first_examples(trainer, 1)[0].prompt:
            raise ConfigError("eval_samples needs rows with a prompt, which an encoder reads.")
        trainer.add_callback(EvalSamplesCallback(trainer))
