"""Signals that end a run with a checkpoint."""

from __future__ import annotations

import signal

ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_IGNORED = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGXCPU", "SIGUSR1", "SIGQUIT") if hasattr(signal, name)
)
"""Signals of clusters and terminals; `nohup` has SIGHUP ignored, and is obeyed."""
SIGNALS = (*ALWAYS, *UNLESS_IGNORED)


def handled() -> list[signal.Signals]:
    """Those that end this process's run."""
    return [each for each in SIGNALS if each in ALWAYS or signal.getsignal(each) is not signal.SIG_IGN]
