"""Skip and count steps whose loss or gradient is not finite; several in a row end the run with an error that names the rows.

    norm of the gradient, over all processes:   finite ──▶ the step is taken
                                                else   ──▶ gradients are dropped, so that the optimizer changes nothing

The norm is computed anyway, and is the same on all processes, so that all decide alike. `propagate_nonfinite` makes the gradient
non-finite if the loss is. So the check costs one number copied to the host per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl.errors import TrlError, listed
from trl.models.sharding import shards
from trl.training.metrics import Mark
from trl.types import StepBatch

SHOWN = 5
"""Number of rows that an error names."""


class NonFiniteError(TrlError):
    """Losses, gradients or weights are not finite."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is non-finite if the loss is. Otherwise a NaN from a constant would not reach the
    gradient."""
    return loss * (1 + 0 * loss.detach())


@dataclass(frozen=True)
class Window:
    """The micro-batches of a step, and what to restore if it is skipped.

    groups   the items of each micro-batch
    loss     the accumulated loss before the step
    mark     the metrics before the step
    """

    groups: Sequence[Sequence[Any]]
    batches: Sequence[StepBatch]
    loss: Tensor
    mark: Mark


@dataclass
class SkippedSteps:
    """Counts of skipped steps: in total, in a row, and since the last log."""

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
        """Correct the loss in `logs` to the mean over steps that were not skipped (NaN if all were); reset counts since
        the log."""
        taken, steps = self.since_log - self.skipped_since_log, self.since_log
        self.since_log = self.skipped_since_log = 0
        found = {**logs, "skipped_steps": self.skipped} if self.skipped else dict(logs)
        if taken == steps:
            return found
        return {**found, "loss": logs["loss"] * steps / taken if taken else math.nan}

    def corrected_mean(self, loss: float, steps: int) -> float:
        """The mean loss over steps that were not skipped, from a mean over all `steps` in which skipped ones count as 0."""
        taken = steps - self.skipped
        return loss * steps / taken if taken > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def is_finite(norm: Tensor | float | None) -> bool:
    """Whether a gradient norm is finite. DeepSpeed gives −1 for a non-finite norm, and None before the first."""
    return norm is None or 0 <= float(norm) < math.inf


# ---- weights ----


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters whose local shard contains NaN or infinity.

    Tensors of other classes are quantised weights, which training does not change, and are not checked.
    """
    held = shards(model).items()
    checked = ((n, v) for n, v in held if v.is_floating_point() and not v.is_meta and type(v.detach()) is Tensor)
    return [name for name, values in checked if not bool(values.isfinite().all())]


def nonfinite_weights_error(names: Sequence[str], what: str) -> NonFiniteError:
    """The error raised in place of saving non-finite weights as `what`."""
    return NonFiniteError(
        f"{what} is not saved: its weights are not finite ({listed(names, SHOWN)}). Earlier checkpoints are unchanged: resume from "
        "one written before that, with a lower learning_rate."
    )


def last_sound_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The last logged step before the loss diverged for good; None if it has not diverged.

    It has diverged since a step if all later losses are non-finite or above 2 |L| + 1, where L is the lowest loss before.
    """
    lowest, sound, diverged = math.inf, 0, False
    for row in log:
        loss = row.get("loss")
        if not isinstance(loss, int | float):
            continue
        diverged = not math.isfinite(loss) or loss > 2 * abs(lowest) + 1
        if not diverged:
            lowest, sound = min(lowest, loss), row.get("step", 0)
    return sound if diverged else None


# ---- the items that cause it ----


@torch.no_grad()
def items_with_bad_losses(window: Window, losses: Callable[[StepBatch], Tensor]) -> list[Any]:
    """Items whose loss is not finite. `losses(batch)` returns losses on the host. All processes do the same number of passes."""
    bad: list[Any] = []
    for k, batch in enumerate(window.batches):
        loss = losses(batch)
        if k < len(window.groups):  # the other batches are dummies
            rows = ~(loss * batch.weight).flatten(1).isfinite().all(1) if loss.dim() > 1 else ~loss.isfinite()
            numbers = batch.example[:: len(batch.example) // len(rows)]
            bad += [window.groups[k][i] for i in sorted(set(numbers[rows].tolist()))]
    return bad


def items_with_bad_gradients(
    window: Window, loss: Callable[[Any, StepBatch], Tensor], trained: Sequence[nn.Parameter]
) -> list[Any]:
    """Items whose own gradient is not finite: that of `loss(item, its batch)` with respect to the parameters `trained`."""
    if not trained:
        return []
    return [
        item
        for group, batch in zip(window.groups, window.batches, strict=False)
        for item in group
        if not all(
            gradient is None or gradient.isfinite().all()
            for gradient in torch.autograd.grad(loss(item, batch), trained, allow_unused=True)
        )
    ]


def nonfinite_error(
    rows: Sequence[str], what: str, *, in_a_row: int, step: int, limit: int | None, weights: Sequence[str] = ()
) -> NonFiniteError:
    """The error that ends a run in `step`, after `in_a_row` steps whose `what` (loss or gradient) was not finite.

    rows      descriptions of the items that caused it in the last of these steps
    limit     the option max_skipped_steps
    weights   names of parameters that are not finite themselves, so that no row is the cause
    """
    named = (
        f"Rows of the last step whose {what} is not finite: {listed(rows, SHOWN, '; ')}."
        if rows
        else "No single row of the last step is to blame: each row by itself is finite."
    )
    return NonFiniteError(
        f"The loss or its gradient was not finite in {in_a_row} step{'s' * (in_a_row > 1)} in a row, the last of them step "
        f"{step}; max_skipped_steps={limit} ends the run here. {named} "
        f"These steps did not change the model, and the last checkpoint is unchanged. {_advice(weights)}"
    )


def _advice(weights: Sequence[str]) -> str:
    if not weights:
        return "Look at the rows, or lower learning_rate or max_grad_norm, and resume from that checkpoint."
    return (
        f"Weights of the model are not finite ({listed(weights, SHOWN)}), which no row is to blame for: start with other weights, "
        "or resume from a checkpoint in which they are finite, with a lower learning_rate."
    )
