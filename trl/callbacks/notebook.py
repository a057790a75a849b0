"""The table of a run in a notebook: beside the loss, what matters for the method (reward, KL, accuracy, …).

This module needs IPython, which notebooks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import IntervalStrategy, Trainer
from transformers.utils.notebook import NotebookProgressCallback

from trl.callbacks.progress import SHOWN, shown_metrics


def show_table(trainer: Trainer) -> None:
    """Have this table in place of the one that has the loss alone, where that one would be shown."""
    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(TableCallback)


class TableCallback(NotebookProgressCallback):
    """A row for every log, with the evaluation's columns in the row of its step; by epochs, a row for each."""

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
    """The losses of an evaluation, and those of `SHOWN`, so named that the table tells them from the ones of training."""
    named: dict[str, float] = {}
    for name, value in metrics.items():
        metric = name.removeprefix("eval_")
        if metric.endswith("loss"):
            named[name] = value
        elif metric in SHOWN:
            named[f"eval_validation {SHOWN[metric]}"] = value
    return named
