"""Sample completions at every evaluation, for trainers that do not sample in training.

The prompts are those of the first evaluation rows. For a row without a prompt (a text, a dialogue), it is the text before
the last span that is trained on. Sampling is greedy, so that completions only differ between evaluations by training.
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
"""Number of tokens that are the prompt of a text which is trained on from its beginning."""


@dataclass
class EvalSamplesOptions:
    """Options of offline trainers for sampling at evaluations."""

    eval_samples: int = 0
    """Number of evaluation rows for which each evaluation samples completions, for terminal, report, wandb and trackio."""

    eval_samples_max_new_tokens: int = 64
    """Most tokens of such a completion."""


class EvalSamplesCallback(TrainerCallback):
    """Samples at every evaluation. All processes sample, since weights may be sharded; the main one writes."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.trainer = trainer
        self.engine = LocalEngine(trainer.model, trainer.tokenizer, progress=False)
        self.sampled_at: int | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.sampled_at = None  # a second call of `train` counts steps from 0 again

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == self.sampled_at:  # a further dataset of the same evaluation
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
    """The first n evaluation rows as examples; with several evaluation datasets, those of the first."""
    rows = trainer.eval_dataset
    rows = next(iter(rows.values())) if isinstance(rows, Mapping) else rows
    return [] if rows is None else trainer.to_examples(list(islice(rows, n)))[:n]


def prompt_of(example: Example) -> Prompt:
    """The prompt to sample from: the example's own, or the beginning of its text."""
    if example.prompt:
        return Prompt.of(example)
    (completion,) = example.completions
    mask = [1] * len(completion) if completion.mask is None else list(completion.mask)
    starts = [t for t in range(1, len(mask)) if mask[t] and not mask[t - 1]]
    end = starts[-1] if starts else min(OPENING, (len(mask) + 1) // 2)
    return Prompt(list(completion.ids)[:end], example.inputs)


def add_eval_samples(trainer: BaseTrainer) -> None:
    """Add the callback if `eval_samples` is set. Raises ConfigError without evaluation rows, or without prompts to encode."""
    if trainer.args.eval_samples:
        if trainer.eval_dataset is None:
            raise ConfigError("eval_samples takes prompts from evaluation rows: give eval_dataset as well.")
        if unwrap(trainer.model).config.is_encoder_decoder and not first_examples(trainer, 1)[0].prompt:
            raise ConfigError(
                "eval_samples needs rows with a prompt, since an encoder-decoder encodes it: leave it out."
            )
        trainer.add_callback(EvalSamplesCallback(trainer))
