"""Group relative policy optimisation and its family: reinforcement learning whose baseline is the prompt's other samples.

    A_i = (r_i − mean r) / std r,     loss = −min(ρ A, clip(ρ, 1 ± ε) A);     for the others see `trl.algorithms.grpo`

GRPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=short, train_dataset=prompts).train()
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trl.algorithms.advantages import NORMALIZE_THEN_SUM, Scale
from trl.algorithms.entropy_control import EntropyBonus
from trl.algorithms.grpo import GRPO, RatioLevel
from trl.algorithms.importance import Correction, CorrectionMode
from trl.algorithms.policy_gradient import KLEstimate
from trl.algorithms.surrogates import CISPO, GMPO, SAPO, VESPO, Clip, Surrogate
from trl.errors import ConfigError
from trl.trainers.online import OnlineTrainer
from trl.trainers.online_config import OnlineConfig

logger = logging.getLogger(__name__)

GRPOLoss = Literal["grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "vespo", "gmpo", "clip"]


@dataclass
class GRPOConfig(OnlineConfig):
    """Options of `GRPOTrainer`."""

    beta: float = 0.0
    """Coefficient of the KL penalty. 0: no reference is kept."""

    epsilon: float = 0.2
    """How far a ratio may fall below 1 before it is clipped; with loss_type="gmpo" its logarithm, whose paper has 0.4."""

    epsilon_high: float | None = None
    """How far it may rise above 1; with loss_type="cispo" the largest weight itself. None: as `epsilon`, and 5 with
    "cispo" (arXiv:2510.13786)."""

    delta: float | None = None
    """Bound of ratios with a negative advantage (two-sided clipping, arXiv:2505.07291). None: no bound."""

    importance_sampling_level: RatioLevel = "token"
    """What the ratio is of: each "token"; the "sequence", the geometric mean of its tokens' (GSPO, arXiv:2507.18071); or
    the "whole" completion, their product."""

    scale_rewards: Scale | str | bool = "group"
    """Divide advantages by the standard deviation of the "group" or the "batch", by the "mean" of the group (MaxRL,
    arXiv:2602.02710), or by nothing ("none", Dr. GRPO)."""

    loss_type: GRPOLoss = "dapo"
    """How ratios are bounded, and what counts the same. Clipped: "dapo" and "bnpo" (every token), "grpo" (every
    completion), "dr_grpo" (constant), "luspo" (sum), "clip" (what `loss_aggregation` says). Otherwise bounded: "cispo",
    "sapo", "vespo", "gmpo"."""

    sapo_temperature_neg: float = 1.05
    """Temperature of SAPO's gate where the advantage is negative."""

    sapo_temperature_pos: float = 1.0
    """Temperature of SAPO's gate where the advantage is positive."""

    vespo_k_pos: float = 2.0
    """Exponent of VESPO's weight where the advantage is positive."""

    vespo_lambda_pos: float = 3.0
    """Decay of VESPO's weight where the advantage is positive."""

    vespo_k_neg: float = 3.0
    """Exponent of VESPO's weight where the advantage is negative."""

    vespo_lambda_neg: float = 2.0
    """Decay of VESPO's weight where the advantage is negative."""

    kl_estimator: KLEstimate = "k3"
    """Estimate of a token's KL: "k1" (log-ratio), "k2" (half its square), "k3" (unbiased, never negative)."""

    use_bias_correction_kl: bool = True
    """Multiply the KL of a token by its ratio, so that its gradient is that of the reverse KL (arXiv:2512.02556)."""

    kl_in_reward: bool = False
    """Take the KL penalty off the reward, in place of adding it to the loss."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat of a token's mean entropy."""

    use_adaptive_entropy: bool = False
    """Raise the weight of the entropy bonus by steps while entropy is below a target, and lower it above
    (arXiv:2505.22312). It starts at `entropy_coef`."""

    entropy_coef_min: float = 0.0
    """Smallest weight, with use_adaptive_entropy."""

    entropy_coef_max: float = 1.0
    """Largest weight, with use_adaptive_entropy."""

    entropy_coef_delta: float = 0.005
    """Change of the weight with every optimizer step."""

    entropy_target: float = 0.2
    """Mean entropy of a token, in nats, that use_adaptive_entropy keeps the policy from falling below."""

    top_entropy_quantile: float = 1.0
    """Learn from this share of tokens alone, those of highest entropy in the rollout batch (arXiv:2506.01939)."""

    off_policy_mask_threshold: float | None = None
    """Do not learn from completions with a negative advantage that the policy has moved away from by more than this, in
    nats per token (arXiv:2512.02556). None: learn from all."""

    importance_sampling_correction: bool | None = None
    """Weigh samples by π/π_sampler, for an engine whose numbers differ from the model's. None: with use_vllm."""

    importance_sampling_mode: CorrectionMode = "sequence_mask"
    """Weights of each "token_…" or of the whole "sequence_…": "…_truncate" bounds them, "…_mask" sets those beyond the
    bounds to 0."""

    importance_sampling_clip_max: float | None = 3.0
    """Largest such weight. None: no bound."""

    importance_sampling_clip_min: float | None = None
    """Smallest such weight. None: no bound."""

    max_tool_calling_iterations: int | None = None
    """Not available: tools are not called in this version."""

    cast_lm_head_to_fp32: bool = False
    """Not available: log-probabilities are computed in float32 from the head's output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_aggregation = self._averaging()
        self.check_groups()
        self.refuse("max_tool_calling_iterations", "cast_lm_head_to_fp32")
        if self.importance_sampling_correction is None:
            self.importance_sampling_correction = self.use_vllm
        self.make_algorithm()

    def make_algorithm(self) -> GRPO:
        """The algorithm that these options describe."""
        gdpo = self.multi_objective_aggregation == NORMALIZE_THEN_SUM
        return GRPO(
            scale="batch" if gdpo else self.scale_rewards,
            ratio_level=self.importance_sampling_level,
            surrogate=LOSS_TYPES[self.loss_type].surrogate(self),
            beta=self.beta,
            kl=self.kl_estimator,
            unbiased_kl=self.use_bias_correction_kl,
            kl_in_reward=self.kl_in_reward,
            entropy_bonus=self._entropy_bonus(),
            top_entropy=self.top_entropy_quantile,
            off_policy_threshold=self.off_policy_mask_threshold,
            correction=self._correction() if self.importance_sampling_correction else None,
        )

    def _averaging(self) -> str:
        """What counts the same. Raises ConfigError where `loss_type` and `loss_aggregation` ask for different things."""
        averaging = LOSS_TYPES[self.loss_type].averaging or self.loss_aggregation
        if self.loss_aggregation not in (GRPOConfig.loss_aggregation, averaging):
            raise ConfigError(
                f"loss_aggregation={self.loss_aggregation!r} is not that of loss_type={self.loss_type!r}, which is "
                f"{averaging!r}: leave it out, or set loss_type='clip', which takes any."
            )
        if self.importance_sampling_level == "sequence" and averaging == "token":
            logger.warning(
                "importance_sampling_level='sequence' with an average over tokens: the ratio of a sequence counts once for each of "
                "its tokens, so long completions weigh more. GSPO (arXiv:2507.18071) averages over sequences: loss_type='grpo'."
            )
        return averaging

    def _entropy_bonus(self) -> EntropyBonus | None:
        if not self.use_adaptive_entropy:
            return EntropyBonus(self.entropy_coef) if self.entropy_coef else None
        bounds = {"low": self.entropy_coef_min, "high": self.entropy_coef_max}
        return EntropyBonus(self.entropy_coef, self.entropy_target, self.entropy_coef_delta, **bounds)

    def _correction(self) -> Correction:
        bounds = (self.importance_sampling_clip_min, self.importance_sampling_clip_max)
        return Correction(self.importance_sampling_mode, *bounds)


@dataclass(frozen=True)
class LossType:
    """A surrogate made from the options, and how it is averaged (None: as `loss_aggregation` says)."""

    surrogate: Callable[[GRPOConfig], Surrogate]
    averaging: str | None


def _high(config: GRPOConfig) -> float:
    return config.epsilon if config.epsilon_high is None else config.epsilon_high


def _clip(config: GRPOConfig) -> Clip:
    return Clip(config.epsilon, _high(config), config.delta)


def _cispo(config: GRPOConfig) -> CISPO:
    return CISPO() if config.epsilon_high is None else CISPO(config.epsilon_high)


def _sapo(config: GRPOConfig) -> SAPO:
    return SAPO(config.sapo_temperature_pos, config.sapo_temperature_neg)


def _vespo(config: GRPOConfig) -> VESPO:
    return VESPO(config.vespo_k_pos, config.vespo_lambda_pos, config.vespo_k_neg, config.vespo_lambda_neg)


def _gmpo(config: GRPOConfig) -> GMPO:
    return GMPO(config.epsilon, _high(config))


LOSS_TYPES = {
    "grpo": LossType(_clip, "sequence"),
    "dr_grpo": LossType(_clip, "constant"),
    "dapo": LossType(_clip, "token"),
    "bnpo": LossType(_clip, "token"),
    "luspo": LossType(_clip, "sum"),
    "cispo": LossType(_cispo, "token"),
    "sapo": LossType(_sapo, "sequence"),
    "vespo": LossType(_vespo, "token"),
    "gmpo": LossType(_gmpo, "sequence"),
    "clip": LossType(_clip, None),
}
"""Names of known combinations. "clip" leaves the averaging to `loss_aggregation`."""


class GRPOTrainer(OnlineTrainer):
    """Sample groups of completions, and make those likelier that are rewarded above their group's mean.

    Arguments: see `OnlineTrainer`.
    """

    config_class = GRPOConfig
    args: GRPOConfig
