"""What engines measure between two logs."""

from __future__ import annotations


class EngineCounts:
    """Sums and maxima since they were last taken."""

    def __init__(self) -> None:
        self._numbers: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self._numbers[name] = self._numbers.get(name, 0.0) + value

    def largest(self, name: str, value: float) -> None:
        self._numbers[name] = max(self._numbers.get(name, value), value)

    def take(self) -> dict[str, float]:
        """`engine/…` of each; in place of `generated_tokens` their number per second of `generate_seconds`."""
        found, self._numbers = self._numbers, {}
        seconds, tokens = found.get("generate_seconds", 0.0), found.pop("generated_tokens", 0.0)
        if seconds:
            found["tokens_per_second"] = tokens / seconds
        return {f"engine/{name}": value for name, value in found.items()}
