"""Controllers of β, the coefficient of the KL penalty: fixed or adaptive.

    fixed      β
    adaptive   e = clip(KL / target − 1, −0.2, 0.2),      β ← β (1 + e · n / horizon)

The adaptive one is a proportional controller of log β that keeps the mean KL of a response, in nats, near a target. n is
the number of responses since the last update. Ziegler et al. 2019, arXiv:1909.08593, Sec. 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

MAX_ERROR = 0.2
"""Bound of the relative error e, so that one outlier batch cannot change the coefficient much."""


class KLController(Protocol):
    """Holds the current `coefficient`; `updated` returns the controller after `n` responses with mean KL `kl`."""

    coefficient: float

    def updated(self, kl: float, n: int) -> KLController: ...


@dataclass(frozen=True, slots=True)
class FixedKL:
    """A constant coefficient."""

    coefficient: float = 0.2

    def updated(self, kl: float, n: int) -> FixedKL:
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """Raises the coefficient while the KL is above `target`, lowers it while it is below."""

    coefficient: float = 0.2
    target: float = 6.0
    """Target of the mean KL of a response, in nats."""
    horizon: float = 10_000.0
    """Number of responses after which an unclipped relative error of 1 would double the coefficient."""

    def updated(self, kl: float, n: int) -> AdaptiveKL:
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        return replace(self, coefficient=self.coefficient * (1 + error * n / self.horizon))
