"""Folders through which weights reach samplers: one per version, which appears only when it is complete.

    write to "7.partial" ──rename──▶ "7" ──every server has read it──▶ "6" is deleted

On one machine they are in shared memory, so that a version is a copy in memory; for several machines, on a file system that
all of them share.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from trl.errors import EngineError

MEMORY = Path("/dev/shm")
NAME = re.compile(r"trl-weights-(?P<host>.+)-(?P<process>\d+)-[^-]+")


def default_root() -> Path:
    """Shared memory (/dev/shm) if it exists and is writable, else the system's folder for temporary files."""
    return MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())


class WeightFolders:
    """Versions of weights in a new folder below `root`. Folders that killed processes left there are deleted first."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _delete_left_over(root)
        prefix = f"trl-weights-{socket.gethostname()}-{os.getpid()}-"
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        self.folder.chmod(0o755)  # a server may run under another user
        atexit.register(self.close)

    def publish(self, version: str, write: Callable[[Path], None]) -> Path:
        """Have `write(folder)` write a version, and return its folder once it is complete."""
        partial, final = self.folder / f"{version}.partial", self.folder / version
        for old in (partial, final):
            shutil.rmtree(old, ignore_errors=True)
        try:
            write(partial)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise EngineError(f"The weights cannot be written to {partial}: {error}.") from error
        partial.rename(final)
        return final

    def keep_only(self, folder: Path) -> None:
        """Delete all versions except the one in `folder`."""
        for each in self.folder.iterdir():
            if each != folder:
                shutil.rmtree(each, ignore_errors=True)

    def close(self) -> None:
        atexit.unregister(self.close)
        shutil.rmtree(self.folder, ignore_errors=True)


def _delete_left_over(root: Path) -> None:
    for each in root.iterdir():
        found = NAME.fullmatch(each.name)
        if found and found["host"] == socket.gethostname() and not psutil.pid_exists(int(found["process"])):
            shutil.rmtree(each, ignore_errors=True)
