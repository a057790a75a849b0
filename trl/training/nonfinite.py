"""Steps whose loss or gradient is not finite: skipped and counted; several in a row end the run, with the rows named.

    norm of the gradient, over all processes:   finite ──▶ the step is taken
                                                else   ──▶ gradients are dropped, so that the optimizer changes nothing

The norm is computed anyway, and is the same on all processes, so that they decide alike. A loss that is not finite is sent
into the gradient by `propagate_nonfinite`. So a step costs the reading of one number.
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
"""Rows that an error names."""


class NonFiniteError(TrlError):
    """Losses or gradients that are not finite, step after step."""


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The same loss, with a gradient that is not finite where the loss is not: NaN from a constant would get lost."""
    return loss * (1 + 0 * loss.detach())


@dataclass(frozen=True)
class Window:
    """What a step is taken on, and what to go back to if it is skipped.

    groups   the items of each micro-batch
    loss     the loss logged so far
    mark     the metrics so far
    """

    groups: Sequence[Sequence[Any]]
    batches: Sequence[StepBatch]
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

    def corrected_mean(self, loss: float, steps: int) -> float:
        """The mean loss of the steps taken, from that of `steps` in which a skipped one counts 0; NaN without one."""
        taken = steps - self.skipped
        return loss * steps / taken if taken > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


def is_finite(norm: Tensor | float | None) -> bool:
    """Whether a gradient's norm is; DeepSpeed writes −1 for one that is not, and None before there is one."""
    return norm is None or 0 <= float(norm) < math.inf


# ---- weights ----


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or an infinity, in what this process has of them.

    Tensors of classes of their own are quantised weights, which training leaves as they are.
    """
    held = shards(model).items()
    checked = ((n, v) for n, v in held if v.is_floating_point() and not v.is_meta and type(v.detach()) is Tensor)
    return [name for name, values in checked if not bool(values.isfinite().all())]


def nonfinite_weights_error(names: Sequence[str], what: str) -> NonFiniteError:
    """The error for weights that are not to be saved as `what`."""
    return NonFiniteError(
        f"{what} is not saved: its weights are not finite ({listed(names, SHOWN)}). What was saved before is as it was: go on from "
        "a checkpoint written before that, with a lower learning_rate."
    )


def last_sound_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The last step that was logged before the loss diverged for good; None if it has not.

    It has where all losses up to the newest are not finite, or above 2 |L| + 1, where L is the lowest before.
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


# ---- the items behind it ----


@torch.no_grad()
def items_with_bad_losses(window: Window, losses: Callable[[StepBatch], Tensor]) -> list[Any]:
    """Items whose loss is not finite; `losses(batch)` on the host. Every process does as many forward passes."""
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
    """Items whose gradient alone is not finite: that of `loss(item, its batch)` by the parameters `trained`."""
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
    """The error that ends a run in `step`, after so many steps `in_a_row` whose `what` (loss or gradient) is not finite.

    rows      the items of the last of them that are to blame, in words
    limit     the option max_skipped_steps
    weights   names of parameters that are not finite themselves, so that no row is to blame
    """
    named = (
        f"Rows of the last of them whose {what} is not finite: {listed(rows, SHOWN, '; ')}."
        if rows
        else "No single row of the last of them is to blame: its rows are finite one by one."
    )
    return NonFiniteError(
        f"The loss or its gradient was not finite in {in_a_row} step{'s' * (in_a_row > 1)} in a row, the last of them step "
        f"{step}; max_skipped_steps={limit} ends the run here. {named} "
        f"Nothing was learned from these steps, and the last checkpoint is as it was. {_advice(weights)}"
    )


def _advice(weights: Sequence[str]) -> str:
    if not weights:
        return "Look at the rows, or lower learning_rate or max_grad_norm, and go on from there."
    return (
        f"Weights of the model are not finite themselves ({listed(weights, SHOWN)}), which no row is to blame for: begin with other "
        "weights, or go on from a checkpoint in which they are finite, with a lower learning_rate."
    )
