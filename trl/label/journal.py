"""The journal of what people said: a line of JSON for each answer, on the disk before the page says that it is kept.

    {"event": "answer", "item": "…", "rater": "ada", "value": 4, "prompt": "…", "completions": ["…"], "time": "…"}
    {"event": "skip", "item": "…", "rater": "ada", "time": "…"}
    {"event": "undo", "item": "…", "rater": "ada", "time": "…"}

Lines are only ever added, so that a kill loses at most a line that was never acknowledged; a line without its end is taken
away when the journal is opened again.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trl.errors import ConfigError, DataError

Event = dict[str, Any]
EVENTS = ("answer", "skip", "undo", "revisit")


class Journal:
    """One process at a time writes to it. Raises ConfigError where another one has it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{path} is being written by another process: stop that one, or use another output."
            ) from None
        self._cut_unfinished_line()
        self._file = path.open("a", encoding="utf-8")

    def _cut_unfinished_line(self) -> None:
        """What a kill in the middle of writing leaves was never acknowledged."""
        if not self.path.is_file():
            return
        whole = self.path.read_bytes().rpartition(b"\n")
        if whole[2]:
            with self.path.open("r+b") as file:
                file.truncate(len(whole[0]) + len(whole[1]))

    def read(self) -> list[Event]:
        """All events, oldest first. Raises DataError, with the line, for what is none."""
        with self.path.open(encoding="utf-8") as lines:
            return [self._event(line, number) for number, line in enumerate(lines, start=1)]

    def _event(self, line: str, number: int) -> Event:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if not isinstance(event, dict) or event.get("event") not in EVENTS:
            raise DataError(
                f"{self.path}, line {number} is no event of a journal: take the line out, or use another output."
            )
        return event

    def add(self, **event: Any) -> None:
        """Write an event and wait until the disk has it."""
        event["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._lock.release()


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, whenever the process is killed."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
