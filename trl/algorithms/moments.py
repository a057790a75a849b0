"""Running mean and variance over batches, in one pass.

    δ = x̄_b − x̄,   x̄ ← x̄ + δ n_b / n,   M ← M + M_b + δ² n_a n_b / n,   n = n_a + n_b,   M = Σ (x − x̄)²

Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", Eq. 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Count n, mean x̄ and sum of squared deviations M of all numbers so far."""

    count: int = 0
    mean: float = 0.0
    deviations: float = 0.0

    def updated(self, x: Tensor) -> RunningMoments:
        """Return the moments after adding the numbers `x [N]`."""
        x = x.double()
        count, delta = self.count + len(x), x.mean().item() - self.mean
        deviations = (x - x.mean()).square().sum().item() + delta**2 * self.count * len(x) / count
        return RunningMoments(count, self.mean + delta * len(x) / count, self.deviations + deviations)

    @property
    def std(self) -> float:
        """Standard deviation with Bessel's correction; 1 until two different numbers were seen."""
        return (self.deviations / (self.count - 1)) ** 0.5 if self.deviations > 0 else 1.0

    def scaled(self, x: Tensor, *, centred: bool) -> Tensor:
        """Divide `x [N]` by the standard deviation; with `centred`, subtract the mean first."""
        return (x - self.mean if centred else x) / self.std
