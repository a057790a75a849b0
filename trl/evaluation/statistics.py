"""Numbers of an evaluation, with how sure they are.

    win rate    w = (wins + ½ ties) / n
    interval    w ± 1.96 s / √n,      s the standard deviation of the single outcomes 1, ½, 0

Perplexity is exp(mean negative log-likelihood of the trained tokens), in nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.96
"""Of the normal distribution, 95 % lies within so many standard deviations."""


@dataclass(frozen=True)
class Estimate:
    """A mean of n values and half the width of its 95 % interval."""

    mean: float
    half_width: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half_width:.2g} (n = {self.n:,})"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of the values. Raises ValueError where there are none."""
    if not values:
        raise ValueError("There is nothing to take the mean of.")
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Estimate(statistics.fmean(values), Z * spread / math.sqrt(len(values)), len(values))


def outcome(ours: float, theirs: float) -> float:
    """1 where ours is better, 0 where it is worse, ½ where they tie."""
    return 0.5 if ours == theirs else float(ours > theirs)
