"""Enforce limits on processes from outside: their time, memory, number and output."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

INTERVAL = 0.01
"""Seconds between two checks of memory and number of processes."""
PIECE = 2**16


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program. With tests, they hold for the program and for its tests separately.

    seconds      wall-clock time
    megabytes    memory: address space of each process, and resident memory of all of them together
    processes    concurrent threads and processes
    files        files and folders that it may create
    disk         total size of them, in MB
    output       bytes that it may write to standard output, and to standard error
    """

    seconds: float = 5.0
    megabytes: int = 512
    processes: int = 16
    files: int = 1000
    disk: int = 16
    output: int = 2**20

    def resources(self) -> dict[str, int]:
        """Names and values for `resource.setrlimit`."""
        return {
            "AS": self.megabytes * 2**20,
            "CPU": int(self.seconds) + 2,
            "FSIZE": self.disk * 2**20,
            "NOFILE": 64,
            "CORE": 0,
        }


@dataclass
class Watch:
    """Waits until all `processes` have ended, or kills them when one of `limits` is exceeded."""

    processes: Sequence[subprocess.Popen]
    limits: Limits
    outputs: Sequence[IO[bytes]] = ()
    given: tuple[IO[bytes], bytes] | None = None
    """A standard input, and the bytes to write to it."""
    written: dict[IO[bytes], bytearray] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def run(self) -> str:
        """ "" if the processes ended by themselves, else the limit that they exceeded: the name of a field of `Limits`."""
        self.written = {stream: bytearray() for stream in self.outputs}
        with selectors.DefaultSelector() as selector:
            for stream in self.outputs:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            if self.given:
                os.set_blocking(self.given[0].fileno(), False)
                selector.register(self.given[0], selectors.EVENT_WRITE, memoryview(self.given[1]))
            try:
                return self._until_the_end(selector)
            finally:
                self._kill()
                self._drain(selector)

    def _until_the_end(self, selector: selectors.BaseSelector) -> str:
        end, look = time.monotonic() + self.limits.seconds, 0.0
        while any(process.poll() is None for process in self.processes):
            now = time.monotonic()
            if now >= end:
                return "seconds"
            if now >= look:
                look = now + INTERVAL
                if passed := self._passed():
                    return passed
            self._move(selector, min(INTERVAL, end - now))
            if any(len(text) > self.limits.output for text in self.written.values()):
                return "output"
        return ""

    def _move(self, selector: selectors.BaseSelector, seconds: float) -> None:
        """Read from and write to the pipes that are ready."""
        for key, _ in selector.select(seconds):
            if key.fileobj in self.written:
                piece = os.read(key.fd, PIECE)
                self.written[key.fileobj].extend(piece)
                if not piece:
                    selector.unregister(key.fileobj)
                continue
            rest = _write(key.fd, key.data)
            if rest:
                selector.modify(key.fileobj, selectors.EVENT_WRITE, rest)
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()

    def _drain(self, selector: selectors.BaseSelector) -> None:
        """Read the remaining output of the processes from their pipes."""
        reading = [key for key in selector.get_map().values() if key.fileobj in self.written]
        for key in reading:
            with suppress(BlockingIOError):
                while len(self.written[key.fileobj]) <= self.limits.output and (piece := os.read(key.fd, PIECE)):
                    self.written[key.fileobj].extend(piece)

    def _passed(self) -> str:
        pids = {pid for process in self.processes for pid in descendants(process.pid)}
        self.seen |= pids
        if sum(map(resident, pids)) > self.limits.megabytes * 2**20 * len(self.processes):
            return "megabytes"
        if sum(map(threads, pids)) > (self.limits.processes + HELPERS) * len(self.processes):
            return "processes"
        return ""

    def _kill(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for pid in self.seen - {process.pid for process in self.processes}:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


HELPERS = 6
"""Number of processes of the isolation itself."""


def _write(fd: int, data: memoryview) -> memoryview:
    """Write what can be written at once, and return the rest; empty if the other end is closed."""
    try:
        return data[os.write(fd, data[:PIECE]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def descendants(pid: int) -> list[int]:
    """A process and its descendants, by Linux's /proc; only the process itself on other systems."""
    found = [pid]
    for each in found:
        with suppress(OSError):  # it has ended
            for thread in os.listdir(f"/proc/{each}/task"):
                found += map(int, Path(f"/proc/{each}/task/{thread}/children").read_text().split())
    return found


def resident(pid: int) -> int:
    """Resident memory of a process in bytes; 0 if it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(pages[1]) * os.sysconf("SC_PAGESIZE")


def threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0
