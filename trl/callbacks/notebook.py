"""The progress table of a run in a notebook: the loss, and the main metrics of the method (reward, KL, accuracy, …).

This module needs IPython, which notebooks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import IntervalStrategy, Trainer
from transformers.utils.notebook import NotebookProgressCallback

from trl.callbacks.progress import SHOWN, shown_metrics


def show_table(trainer: Trainer) -> None:
    """Replace the table of `transformers`, which has only the loss, by this one, if it would be shown."""
    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(TableCallback)


class TableCallback(NotebookProgressCallback):
    """Writes a row for every log, with the metrics of an evaluation in the row of its step; or a row for every epoch."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        metrics = shown_metrics(logs or {})
        if "loss" not in metrics or args.eval_strategy == IntervalStrategy.EPOCH or self.training_tracker is None:
            return
        columns = {"Step": state.global_step, "Training Loss": metrics.pop("loss"), "Validation Loss": ""}
        if args.eval_strategy == IntervalStrategy.NO:
            del columns["Validation Loss"]
        self.training_tracker.write_line({**columns, **metrics})

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics=_named(metrics or {}))


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The losses and `SHOWN` metrics of an evaluation, under names that differ from those of training."""
    named: dict[str, float] = {}
    for name, value in metrics.items():
        metric = name.removeprefix("eval_")
        if metric.endswith("loss"):
            named[name] = value
        elif metric in SHOWN:
            named[f"eval_validation {SHOWN[metric]}"] = value
    return named
