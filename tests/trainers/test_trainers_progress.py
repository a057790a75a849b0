"""Bars of progress: what is told beside them, and what others write while they are drawn."""

import io
import os
import re
import signal
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
from rich.console import Console

from trl.callbacks.progress import RichProgressCallback, describe, draws


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    return Console(file=io.StringIO(), force_terminal=True, width=60, height=20, _environ={})


def on_screen(written: str) -> list[str]:
    """Lines that a terminal shows after it was written to: it knows how to erase lines and to go up."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def told(callback: RichProgressCallback, step: int, event: str, **more) -> None:
    state = SimpleNamespace(global_step=step, max_steps=8, is_world_process_zero=True)
    getattr(callback, event)(None, state, None, **more)


def test_metrics_stand_below_their_bars(console):
    bars = RichProgressCallback(console)
    told(bars, 0, "on_train_begin")
    told(bars, 4, "on_step_end")
    told(bars, 4, "on_log", logs={"loss": 1.23456, "tokens_per_second": 301.054, "epoch": 0.5})
    for _ in range(2):
        told(bars, 4, "on_prediction_step", eval_dataloader=[1, 2])
    told(bars, 4, "on_evaluate", metrics={"eval_loss": 2.5, "eval_runtime": 3.0})
    told(bars, 4, "on_log", logs={"train_runtime": 2.0})
    told(bars, 4, "on_train_end")
    training, metrics, evaluation, evaluated = on_screen(console.file.getvalue())
    assert re.fullmatch(r"training   [━╸╺ ]+ 4/8 [-\d:]+", training)
    assert metrics == "           loss 1.235 · 301 tokens/s"
    assert re.fullmatch(r"evaluation [━╸╺ ]+ 2/2 [-\d:]+", evaluation)
    assert evaluated == "           loss 2.500 · at step 4"


def test_lines_where_nothing_can_be_drawn():
    console = Console(file=io.StringIO(), width=60)
    bars = RichProgressCallback(console)
    told(bars, 0, "on_train_begin")
    told(bars, 4, "on_step_end")
    told(bars, 4, "on_log", logs={"loss": 1.23456})
    told(bars, 4, "on_prediction_step", eval_dataloader=[1, 2])
    told(bars, 8, "on_log", logs={"train_runtime": 2.0})
    told(bars, 8, "on_train_end")
    assert console.file.getvalue() == "step 4/8  loss 1.235\n"


@pytest.mark.parametrize(
    ("logs", "text"),
    [
        ({"loss": -3e-9, "reward": -5.5, "kl": 0}, "loss -3.0e-09 · reward -5.500 · KL 0.000"),
        ({"rewards/accuracies": 0.61, "loss": 1234.5}, "loss 1,234.500 · accuracy 0.610"),
        ({"tokens_per_second": 3.0, "train_loss": 2}, ""),
    ],
)
def test_metrics_as_text(logs, text):
    assert describe(logs) == text


def test_lines_stand_above_and_a_bar_of_another_library_below(console):
    """A console of its own, which goes past the proxies that `rich` knows, and `tqdm`, which writes over its line."""
    bars = RichProgressCallback(console)
    with redirect_stdout(console.file):
        told(bars, 0, "on_train_begin")
        Console(force_terminal=True, width=60).print("[bold]a table[/bold]\nof two lines")
        sys.stdout.write("\rSampling:  10%")
        sys.stdout.write("\rSampling: 100%")
        bars.bars.refresh()
        above, below, bar, sampling = on_screen(console.file.getvalue())
        assert (above, below, sampling) == ("a table", "of two lines", "Sampling: 100%")
        assert bar.startswith("training")
        sys.stdout.write("\r              \r")
        bars.bars.refresh()
        told(bars, 8, "on_train_end")
        print("after")
    assert [line.split()[0] for line in on_screen(console.file.getvalue())] == ["a", "of", "training", "after"]


def test_a_console_that_follows_stdout_does_not_lead_back_to_itself(monkeypatch):
    written = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    with redirect_stdout(written):
        bars = RichProgressCallback(Console(force_terminal=True, width=60, height=20, _environ={}))
        told(bars, 0, "on_train_begin")
        print("above")
        bars.console.print("and above")
        told(bars, 8, "on_train_end")
    assert [line.split()[0] for line in on_screen(written.getvalue())] == ["above", "and", "training"]


def test_a_message_of_a_signal_stays(console):
    """The second signal raises, and no bar is drawn after it."""
    told_of = []

    def handler(number, frame):
        told_of.append(number)
        console.file.write("\nFinishing.\n")
        if len(told_of) == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    bars = RichProgressCallback(console)
    try:
        told(bars, 0, "on_train_begin")
        told(bars, 0, "on_log", logs={"loss": 1.0})
        bars.bars.refresh()
        os.kill(os.getpid(), signal.SIGINT)
        bars.bars.refresh()
        seen = [line.split()[0] for line in on_screen(console.file.getvalue())]
        assert seen == ["Finishing.", "training", "loss"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert not bars.bars.live.is_started
        bars.close()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_dumb_terminal_draws_nothing():
    assert draws(Console(force_terminal=True, _environ={"TERM": "xterm"}))
    assert not draws(Console(force_terminal=True, _environ={"TERM": "dumb"}))
    assert not draws(Console(file=io.StringIO()))
