"""People as reward functions: a table of prompt and completion in the terminal, and a question.

HumanRating        a mark from 1 to 5 for every completion,                r = (mark − 3) / 2
HumanPreference    the better one of two completions of a prompt,          r = (wins − losses) / (wins + losses)

Rewards lie in [−1, 1], and 0 is neither good nor bad: a mark of 3, as many wins as losses. `s` leaves a question out (None: no
reward where nothing is known), `q` or Ctrl-C ends the run, with a checkpoint where the run writes one when it is interrupted.

    rate = HumanRating("ratings.jsonl")
    PPOTrainer(args=args, model=model, reward_funcs=rate, train_dataset=prompts).train()

Answers are kept in a file if one is given: what stands there is not asked again, and the file is a dataset that
`RewardTrainer` takes (`prompt, completion, score` or `prompt, chosen, rejected`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trl.errors import ConfigError, DataError
from trl.rewards.signature import check_pairs

MARKS = {str(mark): (mark - 3) / 2 for mark in range(1, 6)}
SKIP, QUIT = "s", "q"

Content = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""


class Stopped(Exception):
    """The person wants to answer no more."""


class Person:
    """Somebody who is shown a table and asked a question.

    answer    gives what is typed, as `input` does. None: the terminal
    console   where tables are shown. None: the terminal
    """

    def __init__(self, answer: Callable[[str], str] | None = None, console: Console | None = None) -> None:
        self.answer = answer
        self.console = console or Console()

    def check(self) -> None:
        """Raises ConfigError where nobody can be asked."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ConfigError(
                f"A person is asked by one process, and this run has {processes}: start it with one (num_processes=1), or "
                "train a reward model on the answers first."
            )
        if self.answer is None and not sys.stdin.isatty():
            raise ConfigError(
                "A person is asked in the terminal, and this run has none (its input is a file, a pipe or a batch job): "
                "start it in a terminal, or give HumanRating(answer=...) a function that asks in another way, as input "
                "does in a notebook."
            )

    def ask(self, table: Table, question: str, choices: Iterable[str]) -> str | None:
        """One of the choices; None to leave the question out. Anything else is asked again. Raises Stopped."""
        known = [*choices, SKIP, QUIT]
        self.console.print(table)
        while (word := self._read(question)) not in known:
            self.console.print(
                f"{word!r} is none of {', '.join(known)}.", style="yellow", highlight=False, markup=False
            )
        if word == QUIT:
            raise Stopped
        return None if word == SKIP else word

    def _read(self, question: str) -> str:
        """What is typed; the end of input is a wish to stop."""
        try:
            return (self.answer or input)(f"{question}, {SKIP} skip, {QUIT} quit: ").strip().lower()
        except EOFError:
            return QUIT


class _Asking:
    """What rating and preference have in common: a person, and a file of what was said."""

    runs_in_trainer = True
    """The terminal is the trainer's: a person is not asked by another process for a time limit."""

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        answer: Callable[[str], str] | None = None,
        console: Console | None = None,
    ) -> None:
        self.person = Person(answer, console)
        self.file = None if file is None else Path(file).expanduser()

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any
    ) -> list[float | None]:
        """A reward for every completion, None where nothing was said."""
        check_pairs(prompts, completions)
        self.person.check()
        rewards: list[float | None] = [None] * len(prompts)
        stopped = False
        with bars_aside(), plain_interrupts():
            try:
                self._fill(rewards, prompts, completions)
            except (Stopped, KeyboardInterrupt):
                stopped = True
        if stopped:
            self.person.console.print("\nWhat was not judged has no reward.", style="dim")
            signal.raise_signal(signal.SIGINT)
        return rewards

    def _fill(self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]) -> None:
        raise NotImplementedError

    def _rows(self, *columns: str) -> list[dict[str, Any]]:
        """What was said before. Raises DataError for a line without these columns."""
        if self.file is None or not self.file.is_file():
            return []
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return [_row(line, f"{self.file}, line {number}", columns) for number, line in enumerate(lines, start=1)]

    def _keep(self, **row: Any) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


class HumanRating(_Asking):
    """A person who gives every completion a mark from 1 (bad) to 5 (good).

    file      keeps the answers, a JSON line each: `prompt`, `completion`, `score`
    answer    gives what is typed, as `input` does. None: the terminal
    console   where tables are shown. None: the terminal
    """

    __name__ = "human_rating"

    def _fill(self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]) -> None:
        known = {
            _key(row["prompt"], row["completion"]): row["score"] for row in self._rows("prompt", "completion", "score")
        }
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if (key := _key(prompt, completion)) not in known:
                mark = self._mark(prompt, completion, f"{i + 1} of {len(prompts)}")
                if mark is None:
                    continue
                known[key] = MARKS[mark]
                self._keep(prompt=prompt, completion=completion, score=MARKS[mark])
            rewards[i] = known[key]

    def _mark(self, prompt: Content, completion: Content, title: str) -> str | None:
        table = _table(title, prompt, {"completion": completion})
        return self.person.ask(table, "1 bad … 5 good", MARKS)


class HumanPreference(_Asking):
    """A person who says which of two completions of a prompt is the better one.

    file           keeps the answers, a JSON line each: `prompt`, `chosen`, `rejected`
    comparisons    questions about each prompt at most. None: every completion is compared with every other
    answer         gives what is typed, as `input` does. None: the terminal
    console        where tables are shown. None: the terminal

    Of K completions, K comparisons let each meet two others, see `pairs_in_rings`.
    """

    __name__ = "human_preference"

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        comparisons: int | None = None,
        answer: Callable[[str], str] | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__(file, answer=answer, console=console)
        if comparisons is not None and comparisons < 1:
            raise ConfigError(f"comparisons={comparisons}: ask at least once about each prompt.")
        self.comparisons = comparisons

    def _fill(self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]) -> None:
        groups = [[*members] for _, members in groupby(range(len(prompts)), key=lambda i: _plain(prompts[i]))]
        known = {
            _key(row["prompt"], row["chosen"], row["rejected"]) for row in self._rows("prompt", "chosen", "rejected")
        }
        for number, members in enumerate(groups):
            if len(members) == 1:
                raise ConfigError(
                    "human_preference compares completions of a prompt, and this prompt has one: set num_generations to 2 "
                    "or more, or ask for marks (human_rating)."
                )
            won, lost = [0] * len(members), [0] * len(members)
            try:
                for pair in pairs_in_rings(len(members), self.comparisons):
                    texts = [completions[members[k]] for k in pair]
                    first = self._first_is_better(prompts[members[0]], texts, f"{number + 1} of {len(groups)}", known)
                    if first is not None:
                        winner, loser = pair if first else reversed(pair)
                        won[winner] += 1
                        lost[loser] += 1
            finally:
                for member, wins, losses in zip(members, won, lost, strict=True):
                    rewards[member] = (wins - losses) / (wins + losses) if wins + losses else None

    def _first_is_better(
        self, prompt: Content, texts: Sequence[Content], title: str, known: set[tuple[str, ...]]
    ) -> bool | None:
        for first, pair in ((True, texts), (False, texts[::-1])):
            if _key(prompt, *pair) in known:
                return first
        if _plain(texts[0]) == _plain(texts[1]):
            return None
        word = self.person.ask(_table(title, prompt, {"1": texts[0], "2": texts[1]}), "1 or 2 is better", ("1", "2"))
        if word is None:
            return None
        chosen, rejected = texts if word == "1" else texts[::-1]
        known.add(_key(prompt, chosen, rejected))
        self._keep(prompt=prompt, chosen=chosen, rejected=rejected)
        return word == "1"


@contextmanager
def bars_aside() -> Iterator[None]:
    """Bars of progress that are drawn again and again stand aside, for they would write over what is typed."""
    bars = [live for thread in threading.enumerate() if isinstance(live := vars(thread).get("live"), Live)]
    for bar in bars:
        bar.stop()
    try:
        yield
    finally:
        for bar in bars:
            bar.start()


@contextmanager
def plain_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, for the moment, whatever else it does in this run.

    Outside the main thread, where Python handles no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def pairs_in_rings(count: int, most: int | None = None) -> list[tuple[int, int]]:
    """Pairs of `count` members, at most `most` of them: neighbours in a circle first, then those at distance 2, ….

    Every ring has each member once in first and once in second place, so that none is favoured by where it is shown.
    """
    pairs = [
        (i, (i + distance) % count)
        for distance in range(1, count // 2 + 1)
        for i in range(count // 2 if 2 * distance == count else count)
    ]
    return pairs[:most]


def _row(line: str, where: str, columns: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON (cut off?): take the line out, or keep answers in another file."
        ) from error
    if missing := [column for column in columns if column not in row]:
        raise DataError(
            f"{where} has no {missing[0]!r}: the file holds something else, so keep answers in another one."
        )
    return row


def _plain(content: Content) -> str:
    """A text, or the messages of a conversation under their roles."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


def _key(*contents: Content) -> tuple[str, ...]:
    return tuple(map(_plain, contents))


def _table(title: str, prompt: Content, completions: Mapping[str, Content]) -> Table:
    """The prompt over its completions, side by side."""
    table = Table(
        *completions, title=Text(f"{title}\n{_plain(prompt)}", style="bold"), title_justify="left", expand=True
    )
    table.add_row(*(Text(_plain(completion)) for completion in completions.values()))
    return table
