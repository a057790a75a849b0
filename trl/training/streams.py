"""Standard streams that are closed, full, or of a terminal that knows ASCII alone cost a run its lines, not its model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

NAMES = ("stdout", "stderr")


class SteadyStream:
    """A text stream that goes on when nobody can be written to any more, and shows what it cannot encode by its number."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a reader that has left, a full disk, a stream that was closed
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_streams() -> Iterator[None]:
    """Standard output and error as `SteadyStream`s meanwhile; in place of one that is not there, nothing."""
    before = {name: getattr(sys, name) for name in NAMES}
    for name, stream in before.items():
        if not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream or open(os.devnull, "w")))  # noqa: SIM115
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            if stream is not None:
                setattr(sys, name, stream)


def occupy_closed_descriptors() -> None:
    """Open the null device in place of standard streams that were closed (`>&-`), so that no file of ours is taken for them."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
