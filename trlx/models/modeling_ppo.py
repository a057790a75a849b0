"""Options of PPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trlx.data.method_configs import MethodConfig, register_method

GEN_KWARGS = {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True}


@dataclass
@register_method
class PPOConfig(MethodConfig):
    """Online: learn from the rewards of the policy's own samples, with a value head and a KL penalty."""

    name: str = "PPOConfig"

    ppo_epochs: int = 4
    """Passes over each set of rollouts."""

    num_rollouts: int = 128
    """Rollouts per set, in each process."""

    chunk_size: int = 128
    """Samples per call of the reward function."""

    init_kl_coef: float = 0.001
    """Coefficient of the KL penalty; its initial value with a `target`."""

    target: float | None = None
    """KL of an output, in nats, towards which the coefficient adapts. None: the coefficient is constant."""

    horizon: int = 10000
    """Number of rollouts over which the coefficient adapts."""

    gamma: float = 1.0
    """Discount of a token's later rewards."""

    lam: float = 0.95
    """λ of generalised advantage estimation."""

    cliprange: float = 0.2
    """ε: probability ratios are clipped to [1 − ε, 1 + ε]; a token beyond that gives no gradient."""

    cliprange_value: float = 0.2
    """ε_v: values are clipped to within ε_v of those at sampling time."""

    vf_coef: float = 1.0
    """Weight of the value loss."""

    scale_reward: str | bool | None = "ignored"
    """Divide scores by their "running" standard deviation, by that of the first rollouts ("ref"), or not ("ignored", False)."""

    ref_mean: float | None = None
    """Has no effect, since scores are scaled but not shifted; giving it logs a warning."""

    ref_std: float | None = None
    """Standard deviation that `scale_reward="ref"` divides scores by; None measures that of the first rollouts."""

    cliprange_reward: float | None = 10
    """Clip scores to ± this, before they are scaled."""

    gen_kwargs: dict[str, Any] = field(default_factory=lambda: dict(GEN_KWARGS))
    """Sampling options; evaluation runs once per value of an option that is a list."""

    gen_experience_kwargs: dict[str, Any] | None = None
    """Sampling options in training. None: `gen_kwargs`."""

    num_value_layers_unfrozen: int = 0
    """Number of upper layers that the value head has its own copies of."""
