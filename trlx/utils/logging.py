"""Logging of `trlx` and `trl`: one level for both, and a choice of the processes that log.

from trlx.utils import logging;  logging.set_verbosity(logging.WARNING);  logger = logging.get_logger(__name__)

The environment variable TRLX_VERBOSITY ("debug", "info", "warning", "error", "critical") sets the initial level.
"""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping, Sequence
from functools import partial
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, NOTSET, WARN, WARNING  # noqa: F401 (scripts read them here)
from typing import Any

from trl.errors import ConfigError, unknown

LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}
ROOTS = ("trlx", "trl")
EXPLICIT = "[%(levelname)s|%(filename)s:%(lineno)s] %(asctime)s >> %(message)s"

_state: dict[str, Any] = {"progress": True, "handler": None}


class MultiProcessAdapter(logging.LoggerAdapter):
    """Logger that logs in rank 0 only; with `ranks=[1, 2]` in those ranks, with `ranks=[-1]` in all."""

    def log(self, level: int, msg: Any, *args: Any, ranks: Sequence[int] = (0,), **kwargs: Any) -> None:
        rank = int(os.environ.get("RANK", 0))
        if self.isEnabledFor(level) and (rank in ranks or -1 in ranks):
            kwargs.setdefault("stacklevel", 2)
            super().log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        world = int(os.environ.get("WORLD_SIZE", 1))
        return (f"[RANK {os.environ.get('RANK', 0)}] {msg}" if world > 1 else msg), kwargs


def get_logger(name: str | None = None) -> MultiProcessAdapter:
    """The logger `name`, by default that of `trlx`; its methods take the argument `ranks`."""
    enable_default_handler()
    return MultiProcessAdapter(logging.getLogger(name or ROOTS[0]), {})


def get_verbosity() -> int:
    """The level of the `trlx` logger."""
    enable_default_handler()
    return logging.getLogger(ROOTS[0]).getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Show messages of at least this level: `logging.INFO`, …"""
    enable_default_handler()
    for root in ROOTS:
        logging.getLogger(root).setLevel(verbosity)


set_verbosity_debug = partial(set_verbosity, DEBUG)
set_verbosity_info = partial(set_verbosity, INFO)
set_verbosity_warning = partial(set_verbosity, WARNING)
set_verbosity_error = partial(set_verbosity, ERROR)


def enable_default_handler() -> None:
    """Add a handler that writes to standard error, if there is none yet. The level is TRLX_VERBOSITY, by default INFO."""
    if _state["handler"] is not None:
        return
    _state["handler"] = logging.StreamHandler()
    for root in ROOTS:
        logger = logging.getLogger(root)
        logger.addHandler(_state["handler"])
        logger.setLevel(_default_level())


def disable_default_handler() -> None:
    """Remove the handler that writes to standard error."""
    for root in ROOTS:
        if _state["handler"] is not None:
            logging.getLogger(root).removeHandler(_state["handler"])
    _state["handler"] = None


def _default_level() -> int:
    """Level from TRLX_VERBOSITY, by default INFO. Raises ConfigError for an unknown one."""
    wanted = os.environ.get("TRLX_VERBOSITY", "info").lower()
    if wanted not in LEVELS:
        raise ConfigError(unknown("TRLX_VERBOSITY", wanted, LEVELS))
    return LEVELS[wanted]


def enable_explicit_format() -> None:
    """Prefix every line with level, file and time."""
    enable_default_handler()
    _state["handler"].setFormatter(logging.Formatter(EXPLICIT))


def reset_format() -> None:
    """Log the message alone, without a prefix."""
    enable_default_handler()
    _state["handler"].setFormatter(None)


def is_progress_bar_enabled() -> bool:
    """True if training and sampling show progress bars."""
    return _state["progress"]


def enable_progress_bar() -> None:
    """Show progress bars of training and sampling."""
    _state["progress"] = True


def disable_progress_bar() -> None:
    """Hide progress bars."""
    _state["progress"] = False
