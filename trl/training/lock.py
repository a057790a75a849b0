"""One run per output folder: two would remove each other's checkpoints.

    output_dir/.run.lock        {"pid": 4711, "host": "node-3"}, locked by the kernel while the run lasts

The kernel's lock goes with its process, however that ends, so a file that nobody holds is left over and is taken.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trl.errors import ConfigError
from trl.training.collectives import is_main, run_on_main

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder. Raises ConfigError on all processes where another run holds it."""
    lock, holds_it = run_on_main(lambda: acquire(Path(folder))), is_main()
    try:
        yield
    finally:
        if lock is not None and holds_it:
            release(Path(folder), lock)


def check_free(folder: str | Path) -> None:
    """Raises ConfigError where another run holds the lock of a folder: before a model is loaded, on the first process."""
    if int(os.environ.get("RANK", 0)) == 0 and (lock := acquire(Path(folder))) is not None:
        release(Path(folder), lock)


def acquire(folder: Path) -> int | None:
    """The descriptor of a lock that is held from now on; None where the file system has no locks, which is said.

    Raises ConfigError, with process and host, where another process holds it.
    """
    if fcntl is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK_FILE
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 1000).decode(errors="replace")
            os.close(lock)
            if error.errno not in HELD:
                logger.warning(f"{str(folder)!r} cannot be locked ({error.strerror}): do not start a second run there.")
                return None
            raise ConfigError(_refusal(folder, holder)) from error
        if _is_still(file, lock):
            break
        os.close(lock)  # another run has ended between opening and locking, and removed the file
    _take_over(file, lock)
    return lock


def _is_still(file: Path, lock: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(file), os.fstat(lock))
    return False


def _take_over(file: Path, lock: int) -> None:
    before = os.read(lock, 1000)
    if before:
        logger.info(f"An earlier run in {str(file.parent)!r} ended without a word ({_named(before.decode())}).")
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _refusal(folder: Path, holder: str) -> str:
    return (
        f"output_dir={str(folder)!r} belongs to a run that has not ended ({_named(holder)}): the two would remove each "
        "other's checkpoints. Wait for it, end it, or name another folder."
    )


def _named(content: str) -> str:
    try:
        found = json.loads(content)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, TypeError, KeyError):
        return "of an unknown process"


def release(folder: Path, lock: int) -> None:
    """Remove the file while it is locked, then let go."""
    with suppress(OSError):
        os.remove(folder / LOCK_FILE)
    os.close(lock)
