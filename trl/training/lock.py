"""A lock that allows one run per output folder: two runs would remove each other's checkpoints.

    output_dir/.run.lock        {"pid": 4711, "host": "node-3"}, locked by the operating system while the run lasts

The operating system frees the lock when its process ends in any way, so a file that is not locked is left over from an earlier
run and is reused.
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
    """Hold the lock of an output folder within the context. Raises ConfigError on all processes if another run holds it."""
    lock, holds_it = run_on_main(lambda: acquire(Path(folder))), is_main()
    try:
        yield
    finally:
        if lock is not None and holds_it:
            release(Path(folder), lock)


def check_free(folder: str | Path) -> None:
    """Raises ConfigError on the first process if another run holds the lock of a folder; to be called before loading a model."""
    if int(os.environ.get("RANK", 0)) == 0 and (lock := acquire(Path(folder))) is not None:
        release(Path(folder), lock)


def acquire(folder: Path) -> int | None:
    """Lock a folder and return the file descriptor of the lock; None, with a warning, if the file system has no locks.

    Raises ConfigError with process and host if another process holds the lock.
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
        os.close(lock)  # another run ended between our opening and locking the file, and removed it
    _take_over(file, lock)
    return lock


def _is_still(file: Path, lock: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(file), os.fstat(lock))
    return False


def _take_over(file: Path, lock: int) -> None:
    before = os.read(lock, 1000)
    if before:
        logger.info(f"An earlier run in {str(file.parent)!r} was killed or crashed ({_named(before.decode())}).")
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _refusal(folder: Path, holder: str) -> str:
    return (
        f"output_dir={str(folder)!r} is used by another run ({_named(holder)}): the two would remove each other's checkpoints. "
        "Wait for that run, end it, or name another folder."
    )


def _named(content: str) -> str:
    try:
        found = json.loads(content)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, TypeError, KeyError):
        return "an unknown process"


def release(folder: Path, lock: int) -> None:
    """Remove the file while it is locked, then release the lock."""
    with suppress(OSError):
        os.remove(folder / LOCK_FILE)
    os.close(lock)
