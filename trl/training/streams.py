"""Survive a standard output or error that cannot be written to (closed, full disk, ASCII only): a run only loses output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO

NAMES = ("stdout", "stderr")


class SteadyStream:
    """A text stream that discards its output, without an error, once it cannot be written to any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # a broken pipe, a full disk, a closed stream
            self._discard_output()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._discard_output()

    def _discard_output(self) -> None:
        """Redirect the stream, with its buffer, to the null device: Python would write the buffer again at exit, and fail."""
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_streams() -> Iterator[None]:
    """Replace standard output and error by `SteadyStream`s within the context."""
    prepare_streams()
    before = {name: getattr(sys, name) for name in NAMES}
    for name, stream in before.items():
        setattr(sys, name, SteadyStream(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def prepare_streams() -> None:
    """Make writing to the standard streams safe: open closed ones on the null device, and escape what cannot be encoded."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by `>&-`: the next file that is opened would get this descriptor
            os.open(os.devnull, os.O_RDWR)
    for name in NAMES:
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
