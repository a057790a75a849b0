"""Says what is waited for at servers, where it takes long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from trl.rollouts.connection import Server

logger = logging.getLogger(__name__)

SAY_EVERY = 30.0
"""Seconds after which a wait is spoken of, and again."""


@contextmanager
def spoken_of(servers: Sequence[Server]) -> Iterator[None]:
    """Within it, requests that are under way for long are named every `SAY_EVERY` seconds."""
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
            f"{now - since:.0f} s for {asked} (of {server.timeout:g} s at most)"
            for server in servers
            for asked, since in list(server.under_way.values())
            if now - since >= SAY_EVERY / 2
        ]
        if waits:
            logger.warning("Waiting since %s.", "; ".join(waits))
