"""The journal of a labelling session: one JSON line per event, on disk before the page confirms it.

    {"event": "answer", "item": "…", "rater": "ada", "value": 4, "prompt": "…", "completions": ["…"], "time": "…"}
    {"event": "skip", "item": "…", "rater": "ada", "time": "…"}
    {"event": "undo", "item": "…", "rater": "ada", "time": "…"}

The file is append-only, so that killing the process loses at most a line that was never confirmed. An incomplete last
line is removed when the journal is opened again.
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
    """An append-only file, locked by the process that writes it. Raises ConfigError if another process has it open."""

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
        """Remove an incomplete last line, which a killed process left and never confirmed."""
        if not self.path.is_file():
            return
        whole = self.path.read_bytes().rpartition(b"\n")
        if whole[2]:
            with self.path.open("r+b") as file:
                file.truncate(len(whole[0]) + len(whole[1]))

    def read(self) -> list[Event]:
        """All events, oldest first. Raises DataError, with the line number, for an invalid line."""
        with self.path.open(encoding="utf-8") as lines:
            return [self._event(line, number) for number, line in enumerate(lines, start=1)]

    def _event(self, line: str, number: int) -> Event:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if not isinstance(event, dict) or event.get("event") not in EVENTS:
            raise DataError(
                f"{self.path}, line {number} is not an event of a journal: remove the line, or use another output."
            )
        return event

    def add(self, **event: Any) -> None:
        """Append an event, and return when it is on disk."""
        event["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._lock.release()


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file; if the process is killed, the file has either the old or the new text."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
