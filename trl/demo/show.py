"""What the demo shows: its steps, samples side by side, and what became of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from trl.demo.reviews import is_grammatical


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only, for the moment: the demo says itself what it does."""
    loggers = [logging.getLogger(name) for name in ("trl", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Step:
    """A heading before a step of the demo, and how long it took after it."""

    def __init__(self, console: Console, number: int, title: str, about: str) -> None:
        self.console, self.number, self.title, self.about = console, number, title, about

    def __enter__(self) -> Step:
        self.console.print(Rule(f"[bold]{self.number} · {self.title}", align="left", style="dim"))
        self.console.print(self.about, style="dim", highlight=False)
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.console.print(f"{time.perf_counter() - self.started:.0f} s\n", style="dim", highlight=False)


def share_grammatical(texts: Sequence[str]) -> float:
    """Share of texts that the reviews' grammar could have written."""
    return sum(map(is_grammatical, texts)) / len(texts)


def judge(reward: Any, prompts: Sequence[str], texts: Sequence[str]) -> float:
    """Share of texts with a positive reward, their prompts included."""
    continuations = [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]
    rewards = reward(list(prompts), continuations)
    return sum(value > 0 for value in rewards) / len(rewards)


def table_of_samples(prompts: Sequence[str], columns: Mapping[str, Sequence[str]], *, rows: int) -> Table:
    """What models made of the same prompts, side by side; prompts in bold."""
    table = Table(*columns, show_lines=True, expand=True)
    for i in range(min(rows, len(prompts))):
        table.add_row(*(_marked(prompts[i], texts[i]) for texts in columns.values()))
    return table


def _marked(prompt: str, text: str) -> Text:
    return Text.assemble((prompt, "bold"), text[len(prompt) :])
