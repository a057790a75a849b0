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

from trl.errors import ConfigError, DataError, unknown
from trl.label.live import LiveLabels
from trl.label.settings import ServerSettings
from trl.label.tasks import TIE, Content, Item, pairs_in_rings, score_of
from trl.rewards.signature import check_pairs

MARKS = {str(mark): score_of(mark) for mark in range(1, 6)}
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


class _Asking:
    """What rating and preference have in common: whom they ask, and a file of what was said.

    file              keeps the answers, a JSON line each. None: nothing is kept in the terminal, NAME.jsonl on the web
    ui                "terminal": a table and a question; "web": the page of `trl label`, for one person or several
    answer            gives what is typed, as `input` does. None: the terminal
    console           where tables are shown. None: the terminal
    port, share_on_lan, token, guidelines, raters_per_item    of the page, as options of `trl label`
    """

    task = ""

    runs_in_trainer = True
    """The terminal is the trainer's: a person is not asked by another process for a time limit."""

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        ui: str = "terminal",
        answer: Callable[[str], str] | None = None,
        console: Console | None = None,
        port: int = 8765,
        share_on_lan: bool = False,
        token: str | None = None,
        guidelines: str = "",
        raters_per_item: int = 1,
    ) -> None:
        self.person = Person(answer, console)
        self.file = None if file is None else Path(file).expanduser()
        self.raters_per_item = raters_per_item
        self.settings = ServerSettings(port, share_on_lan, token, guidelines)
        self.use(ui)

    def use(self, ui: str) -> None:
        """Ask in another place from now on. Raises ConfigError for one that is not known."""
        if ui not in UIS:
            raise ConfigError(unknown("ui", ui, UIS))
        self.ui = ui
        self.page = LiveLabels(
            self.task,
            self.file or f"{self.__name__}.jsonl",
            self.settings,
            raters_per_item=self.raters_per_item,
            say=lambda text: self.person.console.print(text, highlight=False, markup=False, soft_wrap=True),
        )

    def __call__(
        self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any
    ) -> list[float | None]:
        """A reward for every completion, None where nothing was said."""
        check_pairs(prompts, completions)
        self.person.check(in_terminal=self.ui == "terminal")
        rewards: list[float | None] = [None] * len(prompts)
        stopped = False
        fill = self._fill if self.ui == "terminal" else self._fill_from_page
        with bars_aside(), plain_interrupts():
            try:
                fill(rewards, prompts, completions)
            except (Stopped, KeyboardInterrupt):
                stopped = True
        if stopped:
            self.person.console.print("\nWhat was not judged has no reward.", style="dim")
            signal.raise_signal(signal.SIGINT)
        return rewards

    def _fill(self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]) -> None:
        raise NotImplementedError

    def _fill_from_page(
        self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]
    ) -> None:
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

    The file holds `prompt`, `completion`, `score`. Of several people's marks the mean counts. Arguments: see `_Asking`.
    """

    __name__ = "human_rating"
    task = "rate"

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

    def _fill_from_page(
        self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]
    ) -> None:
        items = [Item(prompt, (completion,)) for prompt, completion in zip(prompts, completions, strict=True)]
        for i, marks in enumerate(self.page(items)):
            rewards[i] = sum(map(score_of, marks.values())) / len(marks) if marks else None

    def _mark(self, prompt: Content, completion: Content, title: str) -> str | None:
        table = _table(title, prompt, {"completion": completion})
        return self.person.ask(table, "1 bad … 5 good", MARKS)


class HumanPreference(_Asking):
    """A person who says which of two completions of a prompt is the better one.

    comparisons    questions about each prompt at most. None: every completion is compared with every other

    The file holds `prompt`, `chosen`, `rejected`. Of K completions, K comparisons let each meet two others, see
    `pairs_in_rings`. Further arguments: see `_Asking`.
    """

    __name__ = "human_preference"
    task = "compare"

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        comparisons: int | None = None,
        ui: str = "terminal",
        answer: Callable[[str], str] | None = None,
        console: Console | None = None,
        port: int = 8765,
        share_on_lan: bool = False,
        token: str | None = None,
        guidelines: str = "",
        raters_per_item: int = 1,
    ) -> None:
        super().__init__(
            file,
            ui=ui,
            answer=answer,
            console=console,
            port=port,
            share_on_lan=share_on_lan,
            token=token,
            guidelines=guidelines,
            raters_per_item=raters_per_item,
        )
        if comparisons is not None and comparisons < 1:
            raise ConfigError(f"comparisons={comparisons}: ask at least once about each prompt.")
        self.comparisons = comparisons

    def _fill(self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]) -> None:
        groups = _groups(prompts)
        known = {
            _key(row["prompt"], row["chosen"], row["rejected"]) for row in self._rows("prompt", "chosen", "rejected")
        }
        for number, members in enumerate(groups):
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

    def _fill_from_page(
        self, rewards: list[float | None], prompts: Sequence[Content], completions: Sequence[Content]
    ) -> None:
        pairs = [
            (members[first], members[second])
            for members in _groups(prompts)
            for first, second in pairs_in_rings(len(members), self.comparisons)
            if _plain(completions[members[first]]) != _plain(completions[members[second]])
        ]
        items = [Item(prompts[first], (completions[first], completions[second])) for first, second in pairs]
        points: list[list[int]] = [[] for _ in prompts]
        for pair, answers in zip(pairs, self.page(items), strict=True):
            for better in answers.values():
                points[pair[0]].append(0 if better == TIE else 1 - 2 * better)
                points[pair[1]].append(-points[pair[0]][-1])
        rewards[:] = [sum(each) / len(each) if each else None for each in points]

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


def _groups(prompts: Sequence[Content]) -> list[list[int]]:
    """Places of the completions of each prompt. Raises ConfigError where one has nothing to be compared with."""
    groups = [[*members] for _, members in groupby(range(len(prompts)), key=lambda i: _plain(prompts[i]))]
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
