"""Signals that end a run with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_IGNORED = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGXCPU", "SIGUSR1", "SIGQUIT") if hasattr(signal, name)
)
"""Signals of clusters and terminals; those that are ignored stay so, such as SIGHUP under `nohup`."""
SIGNALS = (*ALWAYS, *UNLESS_IGNORED)


def handled() -> list[signal.Signals]:
    """The signals that end the run of this process."""
    return [each for each in SIGNALS if each in ALWAYS or signal.getsignal(each) is not signal.SIG_IGN]


@contextmanager
def handling(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Within it, signals are handled by `handlers`. Has no effect outside the main thread, where Python handles no signals."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()} if in_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
