"""Options of PPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trlx.data.method_configs import MethodConfig, register_method

GEN_KWARGS = {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}


@dataclass
@register_method
class PPOConfig(MethodConfig):
    """Online: learn from rewards of one's own samples, with a value head and a KL penalty."""

    name: str = "PPOConfig"

    ppo_epochs: int = 4
    """Times that a set of rollouts is learned from."""

    num_rollouts: int = 128
    """Rollouts of a set, per process."""

    chunk_size: int = 128
    """Rollouts that are sampled and rewarded at a time."""

    init_kl_coef: float = 0.001
    """Coefficient of the KL penalty; its first value, if there is a `target`."""

    target: float | None = None
    """KL of an output that the coefficient adapts to; None keeps it as it is."""

    horizon: int = 10000
    """Rollouts over which the coefficient adapts."""

    gamma: float = 1.0
    """Discount of a token's later rewards."""

    lam: float = 0.95
    """λ of generalised advantage estimation."""

    cliprange: float = 0.2
    """How far the probability ratio of a token may move before it stops being rewarded."""

    cliprange_value: float = 0.2
    """How far a value may move before it stops being rewarded."""

    vf_coef: float = 1.0
    """Weight of the value loss."""

    scale_reward: str | None = "ignored"
    """Divide scores by their "running" standard deviation, by that of the first rollouts ("ref"), or not ("ignored")."""

    ref_mean: float | None = None
    """Has no effect, which is said if it is given: scores are divided by a standard deviation, and not shifted."""

    ref_std: float | None = None
    """Standard deviation that `scale_reward="ref"` divides scores by; None measures that of the first rollouts."""

    cliprange_reward: float | None = 10
    """Clip scores to ± this, before they are scaled."""

    gen_kwargs: dict[str, Any] = field(default_factory=lambda: dict(GEN_KWARGS))
    """Options of sampling; one that is a list is swept in evaluation."""

    gen_experience_kwargs: dict[str, Any] | None = None
    """Options of sampling in training, where they differ."""

    num_value_layers_unfrozen: int = 0
    """Upper layers of which the value has a copy of its own."""
