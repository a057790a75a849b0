"""Progress in a terminal: one bar with what is being measured; plain lines where output is redirected."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

SHOWN = ("loss", "reward", "rewards/accuracies", "accuracy", "mean_token_accuracy", "kl", "tokens_per_second")
NAMES = {"mean_token_accuracy": "token accuracy", "rewards/accuracies": "accuracy", "tokens_per_second": "tokens/s"}


class RichProgressCallback(TrainerCallback):
    """A bar for training and one for evaluation, with the latest metrics beside it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress: Progress | None = None
        self.training = self.evaluation = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            self.progress = _bars(self.console)
            self.progress.start()
            self.training = self.progress.add_task("training", total=state.max_steps, metrics="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.training, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.progress is None:
            return
        if self.evaluation is None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self.evaluation = self.progress.add_task("evaluation", total=total, metrics="")
        self.progress.advance(self.evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None and self.evaluation is not None:
            self.progress.remove_task(self.evaluation)
            self.evaluation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        text = describe(logs)
        if text and self.progress is not None:
            self.progress.update(self.training, metrics=text)
        elif text:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("[dim]{task.fields[metrics]}"), console=console)


def describe(logs: dict[str, float]) -> str:
    """`loss 1.234 · token accuracy 0.61 · 8,420 tokens/s`, of the metrics that matter most."""
    parts = []
    for name in SHOWN:
        if name in logs:
            value = float(logs[name])
            label = NAMES.get(name, name)
            parts.append(f"{value:,.0f} {label}" if value >= 1000 else f"{label} {value:.3f}")
    return " · ".join(parts)
