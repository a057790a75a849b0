"""Metrics of an engine between two log entries."""

from __future__ import annotations


class EngineCounts:
    """Sums and maxima of an engine's metrics since the last call of `take`."""

    def __init__(self) -> None:
        self._numbers: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self._numbers[name] = self._numbers.get(name, 0.0) + value

    def largest(self, name: str, value: float) -> None:
        self._numbers[name] = max(self._numbers.get(name, value), value)

    def take(self) -> dict[str, float]:
        """Return and reset all metrics, as `engine/…`; `tokens_per_second` takes the place of `generated_tokens`."""
        found, self._numbers = self._numbers, {}
        seconds, tokens = found.get("generate_seconds", 0.0), found.pop("generated_tokens", 0.0)
        if seconds:
            found["tokens_per_second"] = tokens / seconds
        return {f"engine/{name}": value for name, value in found.items()}
