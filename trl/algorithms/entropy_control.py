"""Coefficient α of the entropy bonus, fixed or adaptive: loss − α · mean entropy of the tokens.

    fixed      α = c
    adaptive   c ← clip(c + δ, min, max) where the last step's entropy was at or below the target, else clip(c − δ, …)
               α = c there, else 0

The adaptive coefficient keeps entropy, in nats per token, from falling below a target: He et al. 2025 (Skywork-OR1),
arXiv:2505.22312, Sec. 3.3. An infinite target and δ = 0 give the fixed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EntropyBonus:
    """Controller of the coefficient α: immutable, `updated` after every optimizer step."""

    coefficient: float
    """c: the coefficient that applies while entropy is at or below `target`."""
    target: float = math.inf
    """Entropy, in nats per token, below which it should not fall. Infinite: the bonus always applies."""
    step: float = 0.0
    """δ: change of c per optimizer step."""
    low: float = -math.inf
    """Smallest c."""
    high: float = math.inf
    """Largest c."""
    entropy: float = math.inf
    """Mean entropy of the tokens in the last step, in nats."""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ConfigError(f"entropy_coef_min={self.low} is above entropy_coef_max={self.high}: swap them.")

    @property
    def applied(self) -> float:
        """α for the next step."""
        return self.coefficient if self.entropy <= self.target else 0.0

    def updated(self, entropy: float) -> EntropyBonus:
        """Return the controller after a step whose tokens had mean `entropy`."""
        moved = self.coefficient + (self.step if entropy <= self.target else -self.step)
        return replace(self, coefficient=min(max(moved, self.low), self.high), entropy=entropy)
