"""Options of ILQL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trlx.data.method_configs import MethodConfig, register_method

GEN_KWARGS = {"max_new_tokens": 56, "top_k": 20, "beta": 1, "temperature": 1.0}


@dataclass
@register_method
class ILQLConfig(MethodConfig):
    """Offline: learn Q-values from samples and their rewards."""

    name: str = "ILQLConfig"

    tau: float = 0.7
    """τ: the value is the τ-expectile of Q."""

    gamma: float = 0.99
    """Discount of a token's later rewards."""

    cql_scale: float = 0.1
    """Weight of the CQL loss, which lowers the Q of actions that are not in the data."""

    awac_scale: float = 1
    """Weight of the policy's loss."""

    alpha: float = 0.001
    """Step size of the target heads' moving average of the Q heads."""

    beta: float = 0
    """β in the weights exp(β (Q' − V)) of the policy's loss."""

    steps_for_target_q_sync: int = 5
    """Optimizer steps between two updates of the target heads."""

    two_qs: bool = True
    """Train two Q heads, and use the minimum of their target heads."""

    gen_kwargs: dict[str, Any] = field(default_factory=lambda: dict(GEN_KWARGS))
    """Sampling options, and `beta`, the strength of guidance by Q − V; evaluation runs once per value of an option that
    is a list."""
