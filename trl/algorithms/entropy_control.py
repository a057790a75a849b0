"""The entropy bonus of an algorithm: its coefficient α in loss − α · mean entropy of a token.

    fixed      α = c
    adaptive   c ← clip(c + δ, min, max) where the last step's entropy was at or below the target, else clip(c − δ, …)
               α = c there, else 0

The adaptive one holds entropy, in nats per token, from falling below a target: He et al. 2025 (Skywork-OR1),
arXiv:2505.22312, Sec. 3.3. With a target that no entropy is above, and δ = 0, it is the fixed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EntropyBonus:
    """The coefficient for the next step, from the entropies of the steps before."""

    coefficient: float
    """c, that the bonus has when entropy is low."""
    target: float = math.inf
    """Nats per token that entropy should not fall below. Infinite: entropy is always low."""
    step: float = 0.0
    """δ, by which c changes with every optimizer step."""
    low: float = -math.inf
    """Smallest c."""
    high: float = math.inf
    """Largest c."""
    entropy: float = math.inf
    """Mean entropy of the last step's tokens."""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ConfigError(f"entropy_coef_min={self.low} is above entropy_coef_max={self.high}: swap them.")

    @property
    def applied(self) -> float:
        """α."""
        return self.coefficient if self.entropy <= self.target else 0.0

    def updated(self, entropy: float) -> EntropyBonus:
        """The bonus after a step whose tokens had this mean entropy."""
        moved = self.coefficient + (self.step if entropy <= self.target else -self.step)
        return replace(self, coefficient=min(max(moved, self.low), self.high), entropy=entropy)
