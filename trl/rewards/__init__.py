"""Reward functions, by the names that trainers and the command line use for them.

They are imported on first use, so that the process of a reward function that does not need torch starts without it.
"""

from __future__ import annotations

from typing import Any

from trl.compat.names import missing
from trl.lazy import load, modules_of

_MODULE_OF = modules_of(__file__)

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise missing("trl.rewards", name)
    return load(__name__, name, _MODULE_OF[name])


def __dir__() -> list[str]:
    return __all__
