"""Steps whose loss or gradient is not finite: skipped and counted; several in a row end the run, with the rows named.

    norm of the gradient, over all processes:   finite ──▶ the step is taken
                                                else   ──▶ gradients are dropped, so that the optimizer changes nothing

The norm is computed anyway, and is the same on all processes, so that they decide alike. A loss that is not finite is sent
into the gradient by `propagate_nonfinite`. So a step costs the reading of one number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn

from trl.data.encode import decode
from trl.errors import TrlError
from trl.types import Batch, Example

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer
    from trl.training.metrics import Mark

SHOWN = 5
"""Rows that an error names."""
WIDTH = 60
"""Characters of a row that it shows."""


class NonFiniteError(TrlError):
    """Losses or gradients that are not finite, step after step."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The same loss, with a gradient that is not finite where the loss is not: NaN from a constant would get lost."""
    return loss * (1 + 0 * loss.detach())


@dataclass(frozen=True)
class Window:
    """What a step is taken on, and what to go back to if it is skipped.

    groups   the examples of each micro-batch
    loss     the loss logged so far
    mark     the metrics so far
    """

    groups: Sequence[Sequence[Example]]
    batches: Sequence[Batch]
    loss: Tensor
    mark: Mark


@dataclass
class SkippedSteps:
    """Steps that were skipped: in all, in a row, and of those since the last log."""

    skipped: int = 0
    in_a_row: int = 0
    since_log: int = 0
    skipped_since_log: int = 0

    def add(self, *, skipped: bool) -> None:
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.since_log += 1
        self.skipped_since_log += skipped

    def corrected(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Logs whose loss is the mean over the steps that were taken, NaN without one; counts from here on."""
        taken, steps = self.since_log - self.skipped_since_log, self.since_log
        self.since_log = self.skipped_since_log = 0
        found = {**logs, "skipped_steps": self.skipped} if self.skipped else dict(logs)
        if taken == steps:
            return found
        return {**found, "loss": logs["loss"] * steps / taken if taken else math.nan}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def is_finite(norm: Tensor | float | None) -> bool:
    """Whether a gradient's norm is; DeepSpeed writes −1 for one that is not, and None before there is one."""
    return norm is None or 0 <= float(norm) < math.inf


def accept_step(trainer: BaseTrainer, model: nn.Module, norm: Tensor | float | None, window: Window) -> bool:
    """Count the step, and drop its gradients if their norm is not finite, so that the optimizer changes nothing.

    Raises NonFiniteError where so many steps in a row were skipped that nothing else is to be expected.
    """
    finite = is_finite(norm)
    trainer.steps.add(skipped=not finite)
    if finite:
        return True
    trainer.rollback_metrics()
    if _ends_run(trainer):
        raise explain(trainer, window, trainer.steps.in_a_row)
    if trainer.accelerator.scaler is None:  # the scaler of float16 skips by itself, and learns from it
        model.zero_grad(set_to_none=True)
    return False


def accept_triplet_step(trainer: BaseTrainer, norm: Tensor | float | None, rows: Sequence[int]) -> bool:
    """Count an optimizer step on the triplets `rows` of a batch, and say whether it is to be taken.

    Raises NonFiniteError where so many in a row are not.
    """
    finite = is_finite(norm)
    trainer.steps.add(skipped=not finite)
    if not finite and _ends_run(trainer):
        raise NonFiniteError(
            f"The loss or its gradient was not finite in {trainer.steps.in_a_row} optimizer steps in a row, and "
            f"max_skipped_steps={trainer.args.max_skipped_steps}. The last of them was on the triplets "
            f"{', '.join(map(str, rows))} of this batch: look at their scores, and at the learning rate. Nothing was "
            "learned from these steps."
        )
    return finite


def _ends_run(trainer: BaseTrainer) -> bool:
    if trainer.is_deepspeed_enabled and not trainer.args.fp16:  # has taken the step by now
        return True
    scaler, most = trainer.accelerator.scaler, trainer.args.max_skipped_steps
    still_looking = scaler is not None and scaler.get_scale() > 1
    return most is not None and trainer.steps.in_a_row >= most and not still_looking


# ---- the rows behind it ----


def explain(trainer: BaseTrainer, window: Window, steps: int) -> NonFiniteError:
    """The error that ends a run after so many `steps` in a row; every process takes part, and names its rows."""
    bad, what = _bad_losses(trainer, window), "loss"
    if not _anywhere(trainer, bool(bad)):
        bad, what = _bad_gradients(trainer, window), "gradient"
    rows = list(_described(trainer, bad))
    rows = gather_object(rows) if trainer.accelerator.num_processes > 1 else rows
    more = f", and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    named = (
        f"Rows of the last of them whose {what} is not finite: {'; '.join(rows[:SHOWN])}{more}."
        if rows
        else "No single row of the last of them is to blame: its rows are finite one by one."
    )
    return NonFiniteError(
        f"The loss or its gradient was not finite in {steps} step{'s' * (steps > 1)} in a row, the last of them step "
        f"{trainer.state.global_step + 1}; max_skipped_steps={trainer.args.max_skipped_steps} ends the run here. {named} "
        "Nothing was learned from these steps, and the last checkpoint is as it was. Look at the rows, or lower "
        "learning_rate or max_grad_norm, and go on from there."
    )


def _anywhere(trainer: BaseTrainer, found: bool) -> bool:
    return any(gather_object([found])) if trainer.accelerator.num_processes > 1 else found


@torch.no_grad()
def _bad_losses(trainer: BaseTrainer, window: Window) -> list[Example]:
    """Examples whose loss is not finite. Every process does as many forward passes."""
    bad: list[Example] = []
    for k, batch in enumerate(window.batches):
        batch = batch.to(trainer.args.device)
        with trainer.compute_loss_context_manager():
            loss, _ = trainer.loss(trainer.model_wrapped, batch)
        if k < len(window.groups):
            rows = ~(loss * batch.weight).flatten(1).isfinite().all(1) if loss.dim() > 1 else ~loss.isfinite()
            numbers = batch.example[:: len(batch.example) // len(rows)]
            bad += [window.groups[k][i] for i in sorted(set(numbers[rows].tolist()))]
    return bad


def _bad_gradients(trainer: BaseTrainer, window: Window) -> list[Example]:
    """Examples whose gradient alone is not finite; unknown for sharded models, whose processes go together."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return []
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    bad = []
    for group, batch in zip(window.groups, window.batches, strict=False):  # the other batches are fillers
        for example in group:
            alone = trainer.lay_out([example])
            of_the_window = {
                k: v[:1].expand(len(alone.mask)) for k, v in batch.signals.items() if k not in alone.signals
            }
            alone = replace(alone, signals={**alone.signals, **of_the_window}).to(trainer.args.device)
            with trainer.compute_loss_context_manager():
                loss, _ = trainer.loss(trainer.model, alone)
            found = torch.autograd.grad((loss * trainer.weights(alone)).sum(), parameters, allow_unused=True)
            if not all(gradient is None or gradient.isfinite().all() for gradient in found):
                bad.append(example)
    return bad


def _described(trainer: BaseTrainer, examples: Sequence[Example]) -> Iterator[str]:
    numbers = row_numbers(trainer.train_dataset, examples[:SHOWN])
    for example, number in zip(examples, [*numbers, *[None] * (len(examples) - len(numbers))], strict=True):
        text = trainer.tokenizer.decode([*example.prompt, *example.completions[0].ids])
        place = "" if number is None else f"train_dataset[{number}] "
        yield f"{place}{text if len(text) <= WIDTH else text[: WIDTH - 1] + '…'!r}"


def row_numbers(rows: Any, examples: Sequence[Example]) -> list[int | None]:
    """Where examples are in the encoded rows; None for those that are not, as samples and rows of a stream."""
    if not isinstance(rows, Dataset) or not {"completion_ids", "seq_lengths"} & set(rows.column_names):
        return [None] * len(examples)
    wanted = {_key(example): i for i, example in enumerate(examples)}
    found: list[int | None] = [None] * len(examples)
    for number, row in enumerate(rows):
        for example in decode(row):
            if (i := wanted.get(_key(example))) is not None and found[i] is None:
                found[i] = number
    return found


def _key(example: Example) -> tuple:
    return tuple(example.prompt), tuple(tuple(c.ids) for c in example.completions)
