"""A labelling session: assigns items to raters, records their answers, and writes the dataset.

The journal holds every event. The dataset beside it is rewritten after each answer, so it can be used for training at
any time. Several people may answer at the same time: an item is shown to one of them only, unless it needs more
answers.
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
"""Seconds for which an item is reserved for the rater who sees it."""


@dataclass(frozen=True)
class Progress:
    """answered, skipped   items that this rater answered and skipped
    left                items that this rater can still judge
    done, total         items with enough answers, and all items
    raters              number of answers by rater
    agreement           of the raters; None if it cannot be computed
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

    output            dataset file in JSON lines; its journal is in the same folder
    form              format of the dataset's rows, see `tasks.ROWS`. None: the task's default
    raters_per_item   number of answers needed per item, from different raters
    live              a training run adds items and waits for answers, which become final once it has used them

    Raises ConfigError, DataError if the output is a file of another kind.
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
            raise ConfigError(f"raters_per_item={raters_per_item}: give at least 1.")
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
        """Add items in this order; known items keep their place. Return the keys of all."""
        with self.changed:
            keys = [item.key for item in items if self.items.setdefault(item.key, item)]
            known = set(self._offered)
            self._offered += [key for key in dict.fromkeys(keys) if key not in known]
            self.changed.notify_all()
            return keys

    def next(self, rater: str) -> Item | None:
        """The first item that this rater has not judged and nobody else sees; it is reserved for them for `LEASE`
        seconds."""
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
        """Record a rater's answer, which replaces an earlier one. Raises DataError for an invalid answer or unknown
        item."""
        with self.changed:
            item = self._item(key)
            value = check_answer(self.task, item, value)
            self._record(_answered(item, key, rater, value))

    def skip(self, rater: str, key: str) -> None:
        with self.changed:
            self._item(key)
            self._record({"event": "skip", "item": key, "rater": rater})

    def undo(self, rater: str) -> tuple[Item, Answer | None]:
        """Undo the rater's last answer or skip. Return its item and the answer. Raises DataError if there is none."""
        with self.changed:
            history = self._history.get(rater)
            if not history:
                raise DataError("There is nothing to undo.")
            key = history[-1]
            if key in self._final:
                raise DataError("Training has already used the earlier answers: they cannot be undone.")
            value = self.answers.get(key, {}).get(rater)
            self._record({"event": "undo", "item": key, "rater": rater})
            self._leases[key] = {**self._leases.get(key, {}), rater: time.monotonic() + LEASE}
            return self.items[key], value

    def revisit(self, rater: str) -> int:
        """Show the rater's skipped items again. Return their number."""
        with self.changed:
            skipped = [key for key, raters in self.skips.items() if rater in raters and key not in self._final]
            if skipped:
                self._record({"event": "revisit", "rater": rater, "item": None})
            return len(skipped)

    def _item(self, key: str) -> Item:
        if key not in self.items:
            raise DataError("This item is unknown to the server: reload the page.")
        if key in self._final:
            raise DataError("Training has already used the answers to this item.")
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
                value = 1 - value  # the journal has the two completions in the reverse order
            self.answers.setdefault(key, {})[rater] = value
        elif event["event"] == "skip":
            self.skips.setdefault(key, set()).add(rater)
        if event["event"] != "undo":
            history.append(key)

    def _adopt(self, earlier: Iterable[tuple[Item, Answer]], journaled: set[str]) -> None:
        """Add answers that are in the dataset but not in the journal, under the rater name "file"."""
        for item, value in earlier:
            if item.key not in journaled:
                event = _answered(item, item.key, "file", value)
                self.journal.add(**event)
                self._apply(event)

    # ---- waiting for answers ----

    def is_done(self, key: str) -> bool:
        """True if the item has enough answers. In a live session, a skip counts as an answer."""
        said, skipped = len(self.answers.get(key, {})), len(self.skips.get(key, ()))
        return said + (skipped if self.live else 0) >= self.raters_per_item

    def wait(self, keys: Iterable[str], timeout: float | None = None) -> bool:
        """Wait until all items are done, and make their answers final. Return False after the timeout."""
        keys = list(keys)
        with self.changed:
            done = self.changed.wait_for(lambda: all(map(self.is_done, keys)), timeout)
            if done:
                self._final |= set(keys)
            return done

    # ---- progress and dataset ----

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
        """Agreement between raters; None for corrections, or if no item has answers of two raters."""
        if self.task == "correct":
            return None
        distance = interval if self.task == "rate" else nominal
        return agreement([list(answers.values()) for answers in self.answers.values()], distance)

    def rows(self) -> list[Row]:
        """The rows of the dataset, made from all answers."""
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
        """Rewrite the dataset."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows()]
        write_atomically(self.output, "".join(lines))

    def close(self) -> None:
        with self.changed:
            self.journal.close()


def _answered(item: Item, key: str, rater: str, value: Answer) -> Event:
    texts = {"prompt": item.prompt, "completions": list(item.completions)}
    return {"event": "answer", "item": key, "rater": rater, "value": value, **texts}


def _earlier_rows(output: Path, task: str, *, has_journal: bool) -> list[tuple[Item, Answer]]:
    """The items and answers in an existing dataset. Raises ConfigError if this task did not write it.

    Rows in other formats than the task's default are skipped if there is a journal, from which they are made again.
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
                    f"{output}, line {number} is not a row that the task {task!r} writes: give another output."
                )
    return found
