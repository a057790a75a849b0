"""Log which requests to servers the trainer is waiting for, when they take long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trl.rollouts.connection import Server

logger = logging.getLogger(__name__)

SAY_EVERY = 30.0
"""Seconds between two log messages about a wait."""


@contextmanager
def logging_waits(servers: Sequence[Server]) -> Iterator[None]:
    """Within it, requests that take long are logged every `SAY_EVERY` seconds."""
    over = threading.Event()
    thread = threading.Thread(target=_speak, args=(servers, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _speak(servers: Sequence[Server], over: threading.Event) -> None:
    while not over.wait(SAY_EVERY):
        now = time.monotonic()
        waits = [
            f"{asked} ({now - since:.0f} s of at most {server.timeout:g} s)"
            for server in servers
            for asked, since in list(server.under_way.values())
            if now - since >= SAY_EVERY / 2
        ]
        if waits:
            logger.warning("Waiting for %s.", "; ".join(waits))
