"""How a trial sends its metrics to the sweep that runs it: trainers call `report`, and the sweep's listener receives
them.

with listening(heard.append):
    main(hparams)                        # somewhere inside: report({"reward/mean": 0.5})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Listener = Callable[[dict[str, float]], Any]

_listener: ContextVar[Listener | None] = ContextVar("sweep", default=None)


def report(metrics: Mapping[str, Any]) -> None:
    """Send the numbers among `metrics` to the sweep, if one is running."""
    listener = _listener.get()
    if listener is not None:
        listener(numbers(metrics))


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numeric values of a mapping, as floats."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Pass all metrics that are reported in this context to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
