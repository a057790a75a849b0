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
    """Expectile that the value is of Q."""

    gamma: float = 0.99
    """Discount of a token's later rewards."""

    cql_scale: float = 0.1
    """Weight of the loss that keeps the Q of other actions low."""

    awac_scale: float = 1
    """Weight of the policy's loss."""

    alpha: float = 0.001
    """Step of the target heads towards the Q heads."""

    beta: float = 0
    """β in the weights exp(β (Q' − V)) of the policy's loss."""

    steps_for_target_q_sync: int = 5
    """Optimizer steps between two steps of the target heads."""

    two_qs: bool = True
    """Learn two Q, and take the smaller."""

    gen_kwargs: dict[str, Any] = field(default_factory=lambda: dict(GEN_KWARGS))
    """Options of sampling, with `beta`, the strength of guidance; one that is a list is swept in evaluation."""
