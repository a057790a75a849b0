"""Human raters as reward functions: they are shown prompt and completion in the terminal or on a web page, and asked to judge.

HumanRating        a mark from 1 to 5 for every completion,                r = (mark − 3) / 2
HumanPreference    the better one of two completions of a prompt,          r = (wins − losses) / (wins + losses)

Rewards are in [−1, 1]; 0 is neutral (a mark of 3, or as many wins as losses). In the terminal, `s` skips a question (a
completion without any judgement has the reward None); `q` or Ctrl-C ends the run, as an interrupt does, with a checkpoint if
the run writes one then.

    rate = HumanRating("ratings.jsonl")
    PPOTrainer(args=args, model=model, reward_funcs=rate, train_dataset=prompts).train()

Answers are saved in a file, if one is given. Answered questions in it are not asked again, and it is a dataset for
`RewardTrainer` (`prompt, completion, score` or `prompt, chosen, rejected`).
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
from trl.imports import check_available
from trl.label.live import LiveLabels
from trl.label.settings import ServerSettings
from trl.label.tasks import MARKS, ROWS, TIE, Answer, Content, Item, check_no_images, pairs_in_rings, score_of, to_rows
from trl.rewards.signature import check_pairs

SKIP, QUIT = "s", "q"
UIS = ("terminal", "web")


class Stopped(Exception):
    """The rater has quit."""


class Person:
    """A rater who is shown a table and asked a question.

    answer    function that asks and returns what is typed, as `input` does. None: the terminal
    console   console for tables. None: the terminal
    """

    def __init__(self, answer: Callable[[str], str] | None = None, console: Console | None = None) -> None:
        self.answer = answer
        self.console = console or Console()

    def check(self, *, in_terminal: bool = True) -> None:
        """Raise ConfigError if nobody can be asked: in a run of several processes, or without a terminal."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ConfigError(
                f"Human rewards need a run of one process, but this one has {processes}: start it with one (num_processes=1), or "
                "train a reward model on the answers first."
            )
        if in_terminal and self.answer is None and not sys.stdin.isatty():
            raise ConfigError(
                "Human rewards are asked for in the terminal, but this run has none (its input is a file, a pipe or a batch job): "
                "start it in a terminal, ask on a web page (ui='web'), or pass a function that asks in another way, "
                "HumanRating(answer=...), such as input in a notebook."
            )

    def ask(self, table: Table, question: str, choices: Iterable[str]) -> str | None:
        """One of the choices, or None to skip the question. After any other answer, asks again. Raises Stopped on quit."""
        known = [*choices, SKIP, QUIT]
        self.console.print(table)
        while (word := self._read(question)) not in known:
            self.console.print(
                f"{word!r} is not one of {', '.join(known)}.", style="yellow", highlight=False, markup=False
            )
        if word == QUIT:
            raise Stopped
        return None if word == SKIP else word

    def _read(self, question: str) -> str:
        """What the rater types; the end of input means quit."""
        try:
            return (self.answer or input)(f"{question}, {SKIP} skip, {QUIT} quit: ").strip().lower()
        except EOFError:
            return QUIT


@dataclass(eq=False, repr=False)
class HumanReward:
    """Base class of `HumanRating` and `HumanPreference`: asks raters, and saves their answers in a file.

    file              file for the answers, one JSON line each. None: not saved in the terminal, NAME.jsonl on the web
    ui                "terminal": a table and a question; "web": the page of `trl label`, for one or several raters
    answer            function that asks and returns what is typed, as `input` does. None: the terminal
    console           console for tables. None: the terminal
    port, share_on_lan, token, guidelines, raters_per_item    options of the page, as in `trl label`

    Subclasses define which completions a question is about (`_asked`), and the points that an answer gives to the first of
    them, from a row of the file (`_points_of_row`) and from the page (`_points_of_answer`). The second gets the negative.
    """

    task: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    """Columns of a row of the file."""
    titles: ClassVar[tuple[str, ...]]
    """Titles of the completions of a question, which are shown side by side."""
    question: ClassVar[str]
    words: ClassVar[Mapping[str, Answer]]
    """What may be typed → the answer that it stands for."""

    runs_in_trainer: ClassVar[bool] = True
    """Keep the function in the trainer's process even with a time limit, since it needs the trainer's terminal."""

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
        """Switch to another user interface. Raises ConfigError for an unknown one."""
        if ui not in UIS:
            raise ConfigError(unknown("ui", ui, UIS))
        for module in ("starlette", "uvicorn") if ui == "web" else ():
            check_available(module, to="ui='web'")
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
        """A reward for every completion, None for those without a judgement."""
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
            self.person.console.print("\nCompletions that were not judged have no reward.", style="dim")
            signal.raise_signal(signal.SIGINT)
        return [sum(own) / len(own) if own else None for own in points]

    def _in_terminal(self, items: Sequence[Item], said: list[list[float]]) -> None:
        """Ask about the items that are not in the file; append the points of each item's first completion to `said`."""
        known = {key: worth for row in self._rows() for key, worth in self._points_of_row(row).items()}
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
                    known |= self._points_of_row(row)
            own.append(known[key])

    def _on_page(self, items: Sequence[Item], said: list[list[float]]) -> None:
        said[:] = [list(map(self._points_of_answer, answers.values())) for answers in self.page(items)]

    def _rows(self) -> list[dict[str, Any]]:
        """The saved answers. Raises DataError for a line without the columns of the task."""
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
    """Raters give every completion a mark from 1 (bad) to 5 (good).

    Rows of the file have `prompt`, `completion`, `score`. With several raters, the mean of their marks counts. Arguments: see
    `HumanReward`.
    """

    __name__ = "human_rating"
    task, columns, titles = "rate", ("prompt", "completion", "score"), ("completion",)
    question, words = "1 bad … 5 good", {str(mark): mark for mark in MARKS}

    def _asked(self, prompts: Sequence[Content], completions: Sequence[Content]) -> list[tuple[int, ...]]:
        return [(i,) for i in range(len(prompts))]

    def _points_of_row(self, row: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
        return {_key(row["prompt"], row["completion"]): row["score"]}

    def _points_of_answer(self, mark: Answer) -> float:
        return score_of(mark)


@dataclass(eq=False, repr=False)
class HumanPreference(HumanReward):
    """Raters choose the better of two completions of a prompt.

    comparisons    most questions per prompt. None: every completion is compared with every other

    Rows of the file have `prompt`, `chosen`, `rejected`. With K comparisons of K completions, each is compared with two
    others: see `pairs_in_rings`. Further arguments: see `HumanReward`.
    """

    __name__ = "human_preference"
    task, columns, titles = "compare", ("prompt", "chosen", "rejected"), ("1", "2")
    question, words = "1 or 2 is better", {"1": 0, "2": 1}

    comparisons: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.comparisons is not None and self.comparisons < 1:
            raise ConfigError(f"comparisons={self.comparisons} is the number of questions per prompt: give at least 1.")

    def _asked(self, prompts: Sequence[Content], completions: Sequence[Content]) -> list[tuple[int, ...]]:
        return [
            (members[first], members[second])
            for members in _groups(prompts)
            for first, second in pairs_in_rings(len(members), self.comparisons)
            if under_roles(completions[members[first]]) != under_roles(completions[members[second]])
        ]

    def _points_of_row(self, row: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        return {_key(prompt, chosen, rejected): 1, _key(prompt, rejected, chosen): -1}

    def _points_of_answer(self, better: Answer) -> float:
        return 0 if better == TIE else 1 - 2 * better


def _groups(prompts: Sequence[Content]) -> list[list[int]]:
    """Indices of the completions of each prompt. Raises ConfigError if a prompt has a single completion."""
    groups = [[*members] for _, members in groupby(range(len(prompts)), key=lambda i: under_roles(prompts[i]))]
    if any(len(members) == 1 for members in groups):
        raise ConfigError(
            "human_preference compares completions of a prompt, but a prompt has only one: set num_generations to at least 2, "
            "or ask for marks (human_rating)."
        )
    return groups


@contextmanager
def bars_aside() -> Iterator[None]:
    """Within it, live progress bars are hidden, since they would write over what the rater types."""
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
    """Within it, Ctrl-C raises KeyboardInterrupt, whichever signal handler the run has installed.

    Has no effect outside the main thread, where Python does not handle signals.
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
            f"{where} is not JSON (is it cut off?): remove the line, or save answers in another file."
        ) from error
    if missing := [column for column in columns if column not in row]:
        raise DataError(
            f"{where} has no {missing[0]!r}, so that the file holds other data: save answers in another file."
        )
    return row


def _key(*contents: Content) -> tuple[str, ...]:
    return tuple(map(under_roles, contents))


def _table(title: str, prompt: Content, completions: Mapping[str, Content]) -> Table:
    """A table with the prompt as its title, and its completions side by side."""
    table = Table(
        *completions, title=Text(f"{title}\n{under_roles(prompt)}", style="bold"), title_justify="left", expand=True
    )
    table.add_row(*(Text(under_roles(completion)) for completion in completions.values()))
    return table


human_rating = HumanRating
human_preference = HumanPreference
