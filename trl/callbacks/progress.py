"""Progress bars in a terminal, one for training and one for evaluation, each with the latest metrics below it.

    training   ━━━━━━━━━━━━╺━━━━━━━━━━━  67/135 0:00:11
               loss 1.118 · token accuracy 0.625 · 5,552 tokens/s

Output of other code is kept: complete lines are printed above the bars, and an unfinished line that is rewritten (a progress
bar of another library) is shown below them. If bars cannot be drawn, each log is printed as a line.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from trl.callbacks.signals import SIGNALS, handling

SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "rewards/accuracies": "accuracy",
    "accuracy": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "kl": "KL",
}
"""Metrics that are shown with the speed → their labels."""

INDENT = 11
UNDISTURBED = {"redirect_stdout": False, "redirect_stderr": False}
"""Options for rich, which must not redirect the streams, since `drawn` does."""


def draws(console: Console) -> bool:
    """True if the console is a terminal that can redraw lines."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def bars_of(trainer: Trainer, console: Console | None = None) -> Iterator[None]:
    """Within it, `trainer` shows these bars instead of its own output; at the end, or on an error, they stop and stay visible."""
    bars = RichProgressCallback(console)
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    trainer.add_callback(bars)
    try:
        yield
    finally:
        bars.close()


class RichProgressCallback(TrainerCallback):
    """A trainer callback with a bar for training and one for evaluation; see the top of the file."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout)
        self.bars = Bars(self.console)
        self.training = self.evaluation = None
        self._drawn = ExitStack()

    def close(self) -> None:
        """Stop drawing."""
        self._drawn.close()
        self.training = self.evaluation = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and draws(self.console):
            self._drawn.enter_context(drawn(self.bars))
            self.training = self.bars.add_task(
                "training", total=state.max_steps, completed=state.global_step, metrics=""
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.training is not None:
            self.bars.update(self.training, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        text = describe(logs or {})
        if text and self.training is not None:
            self.bars.update(self.training, metrics=text)
        elif text and state.is_world_process_zero and not draws(self.console):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self.training is None:
            return
        if self.evaluation is None:
            self.evaluation = self.bars.add_task("evaluation", total=len(eval_dataloader), metrics="")
        if self.bars.tasks[self.evaluation].finished:
            self.bars.reset(self.evaluation)
        self.bars.advance(self.evaluation)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        text = describe({name.removeprefix("eval_"): value for name, value in (metrics or {}).items()})
        if text and self.evaluation is not None:
            self.bars.update(self.evaluation, metrics=f"{text} · at step {state.global_step:,}")


class Bars(Progress):
    """The bars with metrics below each, and at the end the unfinished line of other code."""

    def __init__(self, console: Console) -> None:
        self.unfinished = ""
        columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=24), MofNCompleteColumn())
        time = TimeRemainingColumn(elapsed_when_finished=True)
        super().__init__(*columns, time, console=console, **UNDISTURBED)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["metrics"]:
                yield Padding(Text(task.fields["metrics"], style="dim"), (0, 0, 0, INDENT))
        if self.unfinished:
            yield Text(self.unfinished, no_wrap=True, overflow="crop")

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Within it, the bars are erased; afterwards they are drawn below the output. After an error they stay erased."""
        self.live.transient = True
        self.stop()
        yield
        self.live = Live(console=self.console, get_renderable=self.get_renderable, **UNDISTURBED)
        self.start()


@contextmanager
def drawn(bars: Bars) -> Iterator[None]:
    """Within it, the bars are drawn, and everything written to stdout and stderr is shown above or below them."""
    bars.console.file = bars.console.file  # fix the file: else the console would write to the redirected sys.stdout
    errors = _Aside(sys.stderr, bars) if sys.stderr.isatty() else sys.stderr
    with bars, redirect_stdout(_Aside(sys.stdout, bars)), redirect_stderr(errors), _messages_above(bars):
        yield


class _Aside:
    """A stream whose lines are printed above the bars. It is not the proxy of `rich`, which rich itself would bypass."""

    def __init__(self, file: TextIO, bars: Bars) -> None:
        self.file, self.bars = file, bars

    def write(self, text: str) -> int:
        if not self.bars.live.is_started:
            return self.file.write(text)
        *lines, rest = (self.bars.unfinished + text).split("\n")
        for line in lines:
            self.bars.console.print(Text.from_ansi(_seen(line)), soft_wrap=True, highlight=False)
        self.bars.unfinished = _seen(rest)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _seen(line: str) -> str:
    """The visible part of a line with carriage returns."""
    return line.rstrip("\r").rpartition("\r")[2].rstrip()


def _messages_above(bars: Bars) -> AbstractContextManager[None]:
    """Within it, the bars are erased while a signal is handled, since its handler writes to the terminal directly."""

    def around(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            with bars.gone():
                handler(number, frame)

        return handle

    before = {number: signal.getsignal(number) for number in SIGNALS}
    return handling({number: around(handler) for number, handler in before.items() if callable(handler)})


def describe(logs: Mapping[str, float]) -> str:
    """The main metrics as text, such as `loss 1.234 · token accuracy 0.610 · 8,420 tokens/s`."""
    parts = [f"{label} {_number(value)}" for label, value in shown_metrics(logs).items()]
    if parts and "tokens_per_second" in logs:
        parts.append(f"{float(logs['tokens_per_second']):,.0f} tokens/s")
    return " · ".join(parts)


def shown_metrics(logs: Mapping[str, float]) -> dict[str, float]:
    """The metrics in `SHOWN`, by label."""
    return {label: float(logs[name]) for name, label in SHOWN.items() if name in logs}


def _number(value: float) -> str:
    return f"{value:,.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"
