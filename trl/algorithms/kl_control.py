"""Controllers of the KL penalty's coefficient β.

    fixed      β
    adaptive   e = clip(KL / target − 1, −0.2, 0.2),      β ← β (1 + e · n / horizon)

The adaptive one is proportional control of log β: it holds the KL of a response, in nats, near a target. n is the
number of responses since the last update. Ziegler et al. 2019, arXiv:1909.08593, Sec. 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

MAX_ERROR = 0.2
"""Bound of the relative error, so that one strange batch cannot move the coefficient far."""


class KLController(Protocol):
    """The coefficient now, and the controller after `n` responses whose mean KL was `kl`."""

    coefficient: float

    def updated(self, kl: float, n: int) -> KLController: ...


@dataclass(frozen=True, slots=True)
class FixedKL:
    """The same coefficient throughout."""

    coefficient: float = 0.2

    def updated(self, kl: float, n: int) -> FixedKL:
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """Raises the coefficient while the KL is above `target`, lowers it while it is below."""

    coefficient: float = 0.2
    target: float = 6.0
    """KL of a response, in nats."""
    horizon: float = 10_000.0
    """Responses over which a full error of 1 would double the coefficient."""

    def updated(self, kl: float, n: int) -> AdaptiveKL:
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        return replace(self, coefficient=self.coefficient * (1 + error * n / self.horizon))
