"""Who is asked what, what they said, and the dataset that it makes.

The journal holds everything; the dataset beside it is written anew after each answer, so that it may be trained on at any
moment. Several people may answer at once: an item that one of them looks at is not shown to another one unless more
answers than one are wanted.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.errors import ConfigError, DataError, unknown
from trl.label.agreement import Agreement, agreement, interval, nominal
from trl.label.journal import Event, Journal, write_atomically
from trl.label.tasks import ROWS, TIE, Answer, Item, Row, answer_in, check_answer, check_task, pairs_of, to_rows

LEASE = 900.0
"""Seconds for which an item is one person's."""


@dataclass(frozen=True)
class Progress:
    """answered, skipped   by this rater
    left                what this rater can still be asked
    done, total         items with as many answers as are wanted, and all
    raters              answers of each
    """

    answered: int
    skipped: int
    left: int
    done: int
    total: int
    raters: Mapping[str, int]
    agreement: Agreement | None


class Session:
    """Items, and the answers of all raters.

    output            the dataset, a JSON line a row; its journal stands beside it
    form              rows of the dataset, see `tasks.ROWS`. None: the usual ones of the task
    raters_per_item   answers wanted of each item, each by somebody else
    live              items come during a run that waits for them, and what it has learned from is not taken back

    Raises ConfigError, DataError where the output holds something else.
    """

    def __init__(
        self,
        task: str,
        output: str | Path,
        *,
        form: str | None = None,
        raters_per_item: int = 1,
        live: bool = False,
    ) -> None:
        check_task(task)
        self.form = form or ROWS[task][0]
        if self.form not in ROWS[task]:
            raise ConfigError(unknown(f"form of rows for the task {task!r}", self.form, ROWS[task]))
        if raters_per_item < 1:
            raise ConfigError(f"raters_per_item={raters_per_item}: ask at least one.")
        self.task, self.live, self.raters_per_item = task, live, raters_per_item
        self.output = Path(output).expanduser()
        self.items: dict[str, Item] = {}
        self.answers: dict[str, dict[str, Answer]] = {}
        self.skips: dict[str, set[str]] = {}
        self._offered: list[str] = []
        self._history: dict[str, list[str]] = {}
        self._leases: dict[str, dict[str, float]] = {}
        self._final: set[str] = set()
        self.changed = threading.Condition(threading.RLock())
        path = self.output.with_name(f"{self.output.stem}.journal.jsonl")
        earlier = _earlier_rows(self.output, task, has_journal=path.is_file())
        self.journal = Journal(path)
        try:
            events = self.journal.read()
        except DataError:
            self.journal.close()
            raise
        for event in events:
            self._apply(event)
        self._adopt(earlier, {event["item"] for event in events})

    # ---- items ----

    def add(self, items: Iterable[Item]) -> list[str]:
        """Offer items to the raters, in this order; those that are there already stay where they are. Returns their keys."""
        with self.changed:
            keys = [item.key for item in items if self.items.setdefault(item.key, item)]
            known = set(self._offered)
            self._offered += [key for key in dict.fromkeys(keys) if key not in known]
            self.changed.notify_all()
            return keys

    def next(self, rater: str) -> Item | None:
        """The first item that this rater has not judged and nobody else is busy with; it is theirs for a while."""
        with self.changed:
            now = time.monotonic()
            for key in self._offered:
                if self._is_open(key, rater) and not self._is_taken(key, rater, now):
                    self._leases[key] = {**self._leases.get(key, {}), rater: now + LEASE}
                    return self.items[key]
            return None

    def order(self, rater: str, item: Item) -> list[int]:
        """The places in which the completions are shown: by rater and item, so that no place is favoured."""
        turned = hashlib.sha256(f"{rater}\0{item.key}".encode()).digest()[0] % 2
        places = list(range(len(item.completions)))
        return places[::-1] if turned else places

    def _is_open(self, key: str, rater: str) -> bool:
        said, skipped = self.answers.get(key, {}), self.skips.get(key, set())
        return (
            rater not in said and rater not in skipped and len(said) < self.raters_per_item and key not in self._final
        )

    def _is_taken(self, key: str, rater: str, now: float) -> bool:
        others = [each for each, end in self._leases.get(key, {}).items() if each != rater and end > now]
        return len(self.answers.get(key, {})) + len(others) >= self.raters_per_item

    # ---- answers ----

    def answer(self, rater: str, key: str, value: Any) -> None:
        """Keep what the rater says; said again, it takes the place of what was said before. Raises DataError."""
        with self.changed:
            item = self._item(key)
            value = check_answer(self.task, item, value)
            self._record(_answered(item, key, rater, value))

    def skip(self, rater: str, key: str) -> None:
        with self.changed:
            self._item(key)
            self._record({"event": "skip", "item": key, "rater": rater})

    def undo(self, rater: str) -> tuple[Item, Answer | None]:
        """Take back the rater's last answer or skip. Returns its item, and the answer. Raises DataError where there is none."""
        with self.changed:
            history = self._history.get(rater)
            if not history:
                raise DataError("There is nothing to undo.")
            key = history[-1]
            if key in self._final:
                raise DataError("The model has learned from the answers before this: they cannot be taken back.")
            value = self.answers.get(key, {}).get(rater)
            self._record({"event": "undo", "item": key, "rater": rater})
            self._leases[key] = {**self._leases.get(key, {}), rater: time.monotonic() + LEASE}
            return self.items[key], value

    def revisit(self, rater: str) -> int:
        """Offer again what the rater skipped. Returns how many items."""
        with self.changed:
            skipped = [key for key, raters in self.skips.items() if rater in raters and key not in self._final]
            if skipped:
                self._record({"event": "revisit", "rater": rater, "item": None})
            return len(skipped)

    def _item(self, key: str) -> Item:
        if key not in self.items:
            raise DataError("This item is not known here: reload the page.")
        if key in self._final:
            raise DataError("The model has learned from this item already.")
        return self.items[key]

    def _record(self, event: Event) -> None:
        self.journal.add(**event)
        self._apply(event)
        self.write()
        self.changed.notify_all()

    def _apply(self, event: Event) -> None:
        rater, key = event["rater"], event["item"]
        if event["event"] == "revisit":
            for raters in self.skips.values():
                raters.discard(rater)
            return
        history = self._history.setdefault(rater, [])
        self.answers.get(key, {}).pop(rater, None)
        self.skips.get(key, set()).discard(rater)
        self._leases.get(key, {}).pop(rater, None)
        if key in history:
            history.remove(key)
        if event["event"] == "answer":
            item = Item(event["prompt"], tuple(event["completions"]))
            self.items.setdefault(key, item)
            value = event["value"]
            if item.completions != self.items[key].completions and value != TIE:
                value = 1 - value  # kept when the two completions were given the other way round
            self.answers.setdefault(key, {})[rater] = value
        elif event["event"] == "skip":
            self.skips.setdefault(key, set()).add(rater)
        if event["event"] != "undo":
            history.append(key)

    def _adopt(self, earlier: Iterable[tuple[Item, Answer]], journaled: set[str]) -> None:
        """Answers that stand in the dataset alone are those of somebody who was asked in another way."""
        for item, value in earlier:
            if item.key not in journaled:
                event = _answered(item, item.key, "file", value)
                self.journal.add(**event)
                self._apply(event)

    # ---- a run that waits ----

    def is_done(self, key: str) -> bool:
        """Whether nobody more is to be asked; a live run takes a skip for an answer."""
        said, skipped = len(self.answers.get(key, {})), len(self.skips.get(key, ()))
        return said + (skipped if self.live else 0) >= self.raters_per_item

    def wait(self, keys: Iterable[str], timeout: float | None = None) -> bool:
        """Wait until all are done; then their answers are final. False where time ran out."""
        keys = list(keys)
        with self.changed:
            done = self.changed.wait_for(lambda: all(map(self.is_done, keys)), timeout)
            if done:
                self._final |= set(keys)
            return done

    # ---- what comes of it ----

    def progress(self, rater: str) -> Progress:
        with self.changed:
            said = {key: answers for key, answers in self.answers.items() if answers}
            raters = Counter(rater for answers in said.values() for rater in answers)
            keys = dict.fromkeys([*self._offered, *said])
            return Progress(
                answered=raters[rater],
                skipped=sum(rater in each for each in self.skips.values()),
                left=sum(self._is_open(key, rater) for key in self._offered),
                done=sum(map(self.is_done, keys)),
                total=len(keys),
                raters=dict(raters),
                agreement=self.agreement(),
            )

    def agreement(self) -> Agreement | None:
        """Of the raters' answers; None for corrections, and where nobody answered what somebody else did."""
        if self.task == "correct":
            return None
        distance = interval if self.task == "rate" else nominal
        return agreement([list(answers.values()) for answers in self.answers.values()], distance)

    def rows(self) -> list[Row]:
        """The dataset: the rows that each answer makes, item by item."""
        if self.task == "rate" and self.form == "pairs":
            raters = dict.fromkeys(rater for answers in self.answers.values() for rater in answers)
            return [row for rater in raters for row in pairs_of(self._rated_by(rater))]
        return [
            row
            for key, answers in self.answers.items()
            for value in answers.values()
            for row in to_rows(self.task, self.items[key], value, self.form)
        ]

    def _rated_by(self, rater: str) -> list[tuple[Item, int]]:
        return [(self.items[key], said[rater]) for key, said in self.answers.items() if rater in said]

    def write(self) -> None:
        """Write the dataset anew."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows()]
        write_atomically(self.output, "".join(lines))

    def close(self) -> None:
        with self.changed:
            self.journal.close()


def _answered(item: Item, key: str, rater: str, value: Answer) -> Event:
    texts = {"prompt": item.prompt, "completions": list(item.completions)}
    return {"event": "answer", "item": key, "rater": rater, "value": value, **texts}


def _earlier_rows(output: Path, task: str, *, has_journal: bool) -> list[tuple[Item, Answer]]:
    """What the dataset holds already. Raises ConfigError where that is not what this task writes.

    Rows in another form than the usual one of the task are made from the journal alone.
    """
    if output.is_dir():
        raise ConfigError(f"output={str(output)!r} is a folder: give a file.")
    if not output.is_file():
        return []
    found = []
    with output.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            answered = answer_in(task, line)
            if answered is not None:
                found.append(answered)
            elif not has_journal:
                raise ConfigError(
                    f"{output}, line {number} is no row that the task {task!r} writes: keep answers in another file."
                )
    return found
