"""Controllers of the entropy bonus: its coefficient α in loss − α · mean entropy of a token.

    fixed      α
    adaptive   c ← clip(c + δ, min, max) where the last step's entropy was at or below the target, else clip(c − δ, …)
               α = c there, else 0

The adaptive one holds entropy, in nats per token, from falling below a target: He et al. 2025 (Skywork-OR1),
arXiv:2505.22312, Sec. 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdaptiveEntropy:
    """The coefficient for the next step, from the entropies of the steps before."""

    coefficient: float = 0.0
    """c, that the bonus has when entropy is low."""
    target: float = 0.2
    """Nats per token that entropy should not fall below."""
    step: float = 0.005
    """δ, by which c changes with every optimizer step."""
    low: float = 0.0
    """Smallest c."""
    high: float = 1.0
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

    def updated(self, entropy: float) -> AdaptiveEntropy:
        """The controller after a step whose tokens had this mean entropy."""
        moved = self.coefficient + (self.step if entropy <= self.target else -self.step)
        return replace(self, coefficient=min(max(moved, self.low), self.high), entropy=entropy)
