"""The demo's output: headings of its steps, tables of samples side by side, and of the judges' results."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import datasets
import torch
import transformers
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from trl.demo.judge import Verdict


@contextmanager
def quiet() -> Iterator[None]:
    """Log only errors and show no progress bars of other libraries, because the demo prints its own progress."""
    loggers = [logging.getLogger(name) for name in ("trl", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = [(library, library.is_progress_bar_enabled()) for library in (datasets, transformers.logging)]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for library, _ in bars:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for library, shown in bars:
            if shown:
                library.enable_progress_bar()


@contextmanager
def few_threads(most: int = 1) -> Iterator[None]:
    """Limit torch to `most` threads: for a tiny model, synchronising more threads takes longer than computing."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def step(console: Console, number: int, title: str, about: str) -> Iterator[None]:
    """Print a heading before a step of the demo, and its duration afterwards."""
    console.print(Rule(f"[bold]{number} · {title}", align="left", style="dim"))
    console.print(about, style="dim", highlight=False)
    started = time.perf_counter()
    try:
        yield
    finally:
        console.print(f"{time.perf_counter() - started:.0f} s\n", style="dim", highlight=False)


def table_of_verdicts(before: Verdict, after: Verdict, possible: int | None = None) -> Table:
    """A table of the judges' results before and after PPO. `possible`: see `run.possible_endings`."""
    table = Table("judge", "before PPO", "after PPO")
    for name, words in JUDGES.items():
        values = [getattr(verdict, name) for verdict in (before, after)]
        table.add_row(words, *(f"{value:,}" if isinstance(value, int) else f"{value:.1%}" for value in values))
        if name == "endings" and possible is not None:
            table.add_row("  of as many samples from before PPO that are positive", f"{possible:,}")
    return table


JUDGES = {
    "positive": "positive: the grammar, which knows the side of its sentences",
    "classifier": "positive: a classifier of words, trained on held-out reviews",
    "rewarded": "reward above 0: what was trained against",
    "grammatical": "grammatical throughout",
    "endings": "distinct last sentences",
    "distinct_2": "distinct pairs of words, of all pairs",
}


def table_of_samples(prompts: Sequence[str], columns: Mapping[str, Sequence[str]], *, rows: int) -> Table:
    """A table of completions of the same prompts, side by side; prompts in bold."""
    table = Table(*columns, show_lines=True, expand=True)
    for i in range(min(rows, len(prompts))):
        table.add_row(*(_marked(prompts[i], texts[i]) for texts in columns.values()))
    return table


def _marked(prompt: str, text: str) -> Text:
    return Text.assemble((prompt, "bold"), text[len(prompt) :])
