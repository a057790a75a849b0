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
from dataclasses import KW_ONLY, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trl.data.messages import under_roles
from trl.errors import ConfigError, DataError, unknown
from trl.label.live import LiveLabels
from trl.label.settings import ServerSettings
from trl.label.tasks import MARKS, ROWS, TIE, Answer, Content, Item, check_no_images, pairs_in_rings, score_of, to_rows
from trl.rewards.signature import check_pairs

SKIP, QUIT = "s", "q"
UIS = ("terminal", "web")


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

    def check(self, *, in_terminal: bool = True) -> None:
        """Raises ConfigError where nobody can be asked."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ConfigError(
                f"A person is asked by one process, and this run has {processes}: start it with one (num_processes=1), or "
                "train a reward model on the answers first."
            )
        if in_terminal and self.answer is None and not sys.stdin.isatty():
            raise ConfigError(
                "A person is asked in the terminal, and this run has none (its input is a file, a pipe or a batch job): "
                "start it in a terminal, ask on a web page (ui='web'), or give HumanRating(answer=...) a function that asks in "
                "another way, as input does in a notebook."
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


@dataclass(eq=False, repr=False)
class HumanReward:
    """A person who rewards: base of `HumanRating` and `HumanPreference`. Answers are kept in a file.

    file              keeps the answers, a JSON line each. None: nothing is kept in the terminal, NAME.jsonl on the web
    ui                "terminal": a table and a question; "web": the page of `trl label`, for one person or several
    answer            gives what is typed, as `input` does. None: the terminal
    console           where tables are shown. None: the terminal
    port, share_on_lan, token, guidelines, raters_per_item    of the page, as options of `trl label`

    A subclass says which completions a question is about (`_asked`), and what an answer is worth to the first of them: in a
    row of the file (`_told`) and on the page (`_worth`). To the second it is worth the opposite.
    """

    task: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """Of a row of the file."""
    titles: ClassVar[tuple[str, ...]]
    """Of the completions of a question, side by side."""
    question: ClassVar[str]
    words: ClassVar[Mapping[str, Answer]]
    """What may be typed, and which answer it is."""

    runs_in_trainer: ClassVar[bool] = True
    """The terminal is the trainer's: a person is not asked by another process for a time limit."""

    file: str | Path | None = None
    _: KW_ONLY
    ui: str = "terminal"
    answer: Callable[[str], str] | None = None
    console: Console | None = None
    port: int = 8765
    share_on_lan: bool = False
    token: str | None = None
    guidelines: str = ""
    raters_per_item: int = 1

    def __post_init__(self) -> None:
        self.person = Person(self.answer, self.console)
        self.file = None if self.file is None else Path(self.file).expanduser()
        self.use(self.ui)

    def use(self, ui: str) -> None:
        """Ask in another place from now on. Raises ConfigError for one that is not known."""
        if ui not in UIS:
            raise ConfigError(unknown("ui", ui, UIS))
        self.ui = ui
        self.page = LiveLabels(
            self.task,
            self.file or f"{self.__name__}.jsonl",
            ServerSettings(self.port, self.share_on_lan, self.token, self.guidelines),
            raters_per_item=self.raters_per_item,
            say=lambda text: self.person.console.print(text, highlight=False, markup=False, soft_wrap=True),
        )

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any
    ) -> list[float | None]:
        """A reward for every completion, None where nothing was said."""
        check_pairs(prompts, completions)
        self.person.check(in_terminal=self.ui == "terminal")
        for number, images in enumerate(columns.get("images", ()), start=1):
            check_no_images({"images": images}, f"Sample {number}")
        asked = self._asked(prompts, completions)
        items = [Item(prompts[places[0]], tuple(completions[i] for i in places)) for places in asked]
        said: list[list[float]] = [[] for _ in items]
        stopped = False
        with bars_aside(), plain_interrupts():
            try:
                (self._in_terminal if self.ui == "terminal" else self._on_page)(items, said)
            except (Stopped, KeyboardInterrupt):
                stopped = True
        points: list[list[float]] = [[] for _ in prompts]
        for places, own in zip(asked, said, strict=True):
            for i, sign in zip(places, (1, -1), strict=False):
                points[i] += [sign * point for point in own]
        if stopped:
            self.person.console.print("\nWhat was not judged has no reward.", style="dim")
            signal.raise_signal(signal.SIGINT)
        return [sum(own) / len(own) if own else None for own in points]

    def _in_terminal(self, items: Sequence[Item], said: list[list[float]]) -> None:
        """Ask about what the file does not tell; `said` takes what an answer is worth to the first completion of an item."""
        known = {key: worth for row in self._rows() for key, worth in self._told(row).items()}
        for number, (item, own) in enumerate(zip(items, said, strict=True), start=1):
            key = _key(item.prompt, *item.completions)
            if key not in known:
                table = _table(
                    f"{number} of {len(items)}", item.prompt, dict(zip(self.titles, item.completions, strict=True))
                )
                word = self.person.ask(table, self.question, self.words)
                if word is None:
                    continue
                for row in to_rows(self.task, item, self.words[word], ROWS[self.task][0]):
                    self._keep(row)
                    known |= self._told(row)
            own.append(known[key])

    def _on_page(self, items: Sequence[Item], said: list[list[float]]) -> None:
        said[:] = [list(map(self._worth, answers.values())) for answers in self.page(items)]

    def _rows(self) -> list[dict[str, Any]]:
        """What was said before. Raises DataError for a line without the columns of the task."""
        if self.file is None or not self.file.is_file():
            return []
        with self.file.open(encoding="utf-8") as lines:
            return [_row(line, f"{self.file}, line {n}", self.columns) for n, line in enumerate(lines, start=1)]

    def _keep(self, row: Mapping[str, Any]) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


class HumanRating(HumanReward):
    """A person who gives every completion a mark from 1 (bad) to 5 (good).

    The file holds `prompt`, `completion`, `score`. Of several people's marks the mean counts. Arguments: see `HumanReward`.
    """

    __name__ = "human_rating"
    task, columns, titles = "rate", ("prompt", "completion", "score"), ("completion",)
    question, words = "1 bad … 5 good", {str(mark): mark for mark in MARKS}

    def _asked(self, prompts: Sequence[Content], completions: Sequence[Content]) -> list[tuple[int, ...]]:
        return [(i,) for i in range(len(prompts))]

    def _told(self, row: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
        return {_key(row["prompt"], row["completion"]): row["score"]}

    def _worth(self, mark: Answer) -> float:
        return score_of(mark)


@dataclass(eq=False, repr=False)
class HumanPreference(HumanReward):
    """A person who says which of two completions of a prompt is the better one.

    comparisons    questions about each prompt at most. None: every completion is compared with every other

    The file holds `prompt`, `chosen`, `rejected`. Of K completions, K comparisons let each meet two others, see
    `pairs_in_rings`. Further arguments: see `HumanReward`.
    """

    __name__ = "human_preference"
    task, columns, titles = "compare", ("prompt", "chosen", "rejected"), ("1", "2")
    question, words = "1 or 2 is better", {"1": 0, "2": 1}

    comparisons: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.comparisons is not None and self.comparisons < 1:
            raise ConfigError(f"comparisons={self.comparisons}: ask at least once about each prompt.")

    def _asked(self, prompts: Sequence[Content], completions: Sequence[Content]) -> list[tuple[int, ...]]:
        return [
            (members[first], members[second])
            for members in _groups(prompts)
            for first, second in pairs_in_rings(len(members), self.comparisons)
            if under_roles(completions[members[first]]) != under_roles(completions[members[second]])
        ]

    def _told(self, row: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        return {_key(prompt, chosen, rejected): 1, _key(prompt, rejected, chosen): -1}

    def _worth(self, better: Answer) -> float:
        return 0 if better == TIE else 1 - 2 * better


def _groups(prompts: Sequence[Content]) -> list[list[int]]:
    """Places of the completions of each prompt. Raises ConfigError where one has nothing to be compared with."""
    groups = [[*members] for _, members in groupby(range(len(prompts)), key=lambda i: under_roles(prompts[i]))]
    if any(len(members) == 1 for members in groups):
        raise ConfigError(
            "human_preference compares completions of a prompt, and this prompt has one: set num_generations to 2 or more, "
            "or ask for marks (human_rating)."
        )
    return groups


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


def _key(*contents: Content) -> tuple[str, ...]:
    return tuple(map(under_roles, contents))


def _table(title: str, prompt: Content, completions: Mapping[str, Content]) -> Table:
    """The prompt over its completions, side by side."""
    table = Table(
        *completions, title=Text(f"{title}\n{under_roles(prompt)}", style="bold"), title_justify="left", expand=True
    )
    table.add_row(*(Text(under_roles(completion)) for completion in completions.values()))
    return table


human_rating = HumanRating
human_preference = HumanPreference
