"""Means and win rates of an evaluation, with confidence intervals.

    win rate    w = (wins + ½ ties) / n
    interval    w ± 1.96 s / √n,      where s is the standard deviation of the outcomes 1, ½, 0

Perplexity is exp(mean negative log-likelihood of the trained tokens), in nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.96
"""95 % of a normal distribution lies within this many standard deviations of the mean."""


@dataclass(frozen=True)
class Estimate:
    """The mean of n values, and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half_width:.2g} (n = {self.n:,})"


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of the values. Raises ValueError for an empty sequence."""
    if not values:
        raise ValueError("values is empty: a mean needs at least one value.")
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Estimate(statistics.fmean(values), Z * spread / math.sqrt(len(values)), len(values))


def outcome(ours: float, theirs: float) -> float:
    """1 if ours is better, 0 if it is worse, ½ for a tie."""
    return 0.5 if ours == theirs else float(ours > theirs)
