"""Logging of `trlx` and `trl` together: how much is said, and by which processes.

from trlx.utils import logging;  logging.set_verbosity(logging.WARNING);  logger = logging.get_logger(__name__)

The environment variable TRLX_VERBOSITY ("debug", "info", "warning", "error", "critical") sets the level at the start.
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
    """A logger of the first process alone; with `ranks=[1, 2]` of those, with `ranks=[-1]` of all."""

    def log(self, level: int, msg: Any, *args: Any, ranks: Sequence[int] = (0,), **kwargs: Any) -> None:
        rank = int(os.environ.get("RANK", 0))
        if self.isEnabledFor(level) and (rank in ranks or -1 in ranks):
            kwargs.setdefault("stacklevel", 2)
            super().log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        world = int(os.environ.get("WORLD_SIZE", 1))
        return (f"[RANK {os.environ.get('RANK', 0)}] {msg}" if world > 1 else msg), kwargs


def get_logger(name: str | None = None) -> MultiProcessAdapter:
    """The logger `name`, whose methods take `ranks`; without a name, that of `trlx`."""
    enable_default_handler()
    return MultiProcessAdapter(logging.getLogger(name or ROOTS[0]), {})


def get_verbosity() -> int:
    """The level of `trlx`."""
    enable_default_handler()
    return logging.getLogger(ROOTS[0]).getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Say what is at least of this level: `logging.INFO`, …"""
    enable_default_handler()
    for root in ROOTS:
        logging.getLogger(root).setLevel(verbosity)


set_verbosity_debug = partial(set_verbosity, DEBUG)
set_verbosity_info = partial(set_verbosity, INFO)
set_verbosity_warning = partial(set_verbosity, WARNING)
set_verbosity_error = partial(set_verbosity, ERROR)


def enable_default_handler() -> None:
    """Write to the standard error, once; the level is TRLX_VERBOSITY's, or INFO."""
    if _state["handler"] is not None:
        return
    _state["handler"] = logging.StreamHandler()
    for root in ROOTS:
        logger = logging.getLogger(root)
        logger.addHandler(_state["handler"])
        logger.setLevel(_default_level())


def disable_default_handler() -> None:
    """Leave writing to others."""
    for root in ROOTS:
        if _state["handler"] is not None:
            logging.getLogger(root).removeHandler(_state["handler"])
    _state["handler"] = None


def _default_level() -> int:
    """Raises ConfigError for a TRLX_VERBOSITY that is none."""
    wanted = os.environ.get("TRLX_VERBOSITY", "info").lower()
    if wanted not in LEVELS:
        raise ConfigError(unknown("TRLX_VERBOSITY", wanted, LEVELS))
    return LEVELS[wanted]


def enable_explicit_format() -> None:
    """Begin every line with its level, file and time."""
    enable_default_handler()
    _state["handler"].setFormatter(logging.Formatter(EXPLICIT))


def reset_format() -> None:
    """Say the message alone."""
    enable_default_handler()
    _state["handler"].setFormatter(None)


def is_progress_bar_enabled() -> bool:
    """Whether training and sampling show how far they are."""
    return _state["progress"]


def enable_progress_bar() -> None:
    """Show how far training and sampling are."""
    _state["progress"] = True


def disable_progress_bar() -> None:
    """Do not."""
    _state["progress"] = False
