"""Group relative policy optimisation and its family: policy gradients whose baseline is the mean reward of a prompt's samples.

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
    """Coefficient of the KL penalty. 0: no reference model is loaded."""

    epsilon: float = 0.2
    """Ratios π/π_old are clipped below at 1 − epsilon; with loss_type="gmpo" their logarithm at −epsilon (paper: 0.4)."""

    epsilon_high: float | None = None
    """Ratios are clipped above at 1 + epsilon_high; with loss_type="cispo" it is the largest weight itself. None: as
    `epsilon`, or 5 with "cispo" (arXiv:2510.13786)."""

    delta: float | None = None
    """Upper bound of ratios with a negative advantage (two-sided clipping, arXiv:2505.07291). None: no bound."""

    importance_sampling_level: RatioLevel = "token"
    """One ratio per "token"; per "sequence", the geometric mean of its tokens' ratios (GSPO, arXiv:2507.18071); or for the
    "whole" completion, their product."""

    scale_rewards: Scale | str | bool = "group"
    """Divide advantages by the standard deviation of the "group" or the "batch", by the "mean" of the group (MaxRL,
    arXiv:2602.02710), or by nothing ("none", Dr. GRPO)."""

    loss_type: GRPOLoss = "dapo"
    """How ratios are bounded and the loss is averaged. Clipped: "dapo" and "bnpo" (over tokens), "grpo" (over completions),
    "dr_grpo" ("constant"), "luspo" ("sum"), "clip" (by `loss_aggregation`). Other bounds: "cispo", "sapo", "vespo", "gmpo"."""

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
    """Subtract the KL penalty from the reward, instead of adding it to the loss."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the mean entropy per token, in nats, times this is subtracted from the loss."""

    use_adaptive_entropy: bool = False
    """Adapt the weight of the entropy bonus: each step raises it while the entropy is below `entropy_target`, else lowers
    it (arXiv:2505.22312). It starts at `entropy_coef`."""

    entropy_coef_min: float = 0.0
    """Smallest weight of the entropy bonus, with use_adaptive_entropy."""

    entropy_coef_max: float = 1.0
    """Largest weight of the entropy bonus, with use_adaptive_entropy."""

    entropy_coef_delta: float = 0.005
    """Change of that weight per optimizer step, with use_adaptive_entropy."""

    entropy_target: float = 0.2
    """Mean entropy per token, in nats, below which use_adaptive_entropy raises the bonus."""

    top_entropy_quantile: float = 1.0
    """Train on this fraction of tokens only, those with the highest entropy in the rollout batch (arXiv:2506.01939)."""

    off_policy_mask_threshold: float | None = None
    """Do not train on completions with a negative advantage whose mean log-probability has fallen by more than this since
    sampling, in nats per token (arXiv:2512.02556). None: train on all."""

    importance_sampling_correction: bool | None = None
    """Weight samples by π/π_sampler, where the sampler's log-probabilities differ from the model's. None: if use_vllm."""

    importance_sampling_mode: CorrectionMode = "sequence_mask"
    """One weight per token ("token_…") or per completion ("sequence_…"); "…_truncate" clips weights to the bounds, "…_mask"
    sets those outside the bounds to 0."""

    importance_sampling_clip_max: float | None = 3.0
    """Upper bound of these weights. None: no bound."""

    importance_sampling_clip_min: float | None = None
    """Lower bound of these weights. None: no bound."""

    max_tool_calling_iterations: int | None = None
    """Not available: this version does not call tools."""

    cast_lm_head_to_fp32: bool = False
    """Not available: log-probabilities are always computed in float32 from the head's output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_aggregation = self._averaging()
        self.check_groups()
        self.refuse("max_tool_calling_iterations", "cast_lm_head_to_fp32")
        self.make_algorithm()

    @property
    def reads_sampler_logprobs(self) -> bool:
        """Whether the loss depends on the log-probabilities that come with the samples."""
        return super().reads_sampler_logprobs or bool(self.importance_sampling_correction)

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
            correction=self._correction(),
        )

    def _averaging(self) -> str:
        """How the loss is averaged. Raises ConfigError if `loss_type` and `loss_aggregation` contradict each other."""
        averaging = LOSS_TYPES[self.loss_type].averaging or self.loss_aggregation
        if self.loss_aggregation not in (GRPOConfig.loss_aggregation, averaging):
            raise ConfigError(
                f"loss_aggregation={self.loss_aggregation!r} contradicts loss_type={self.loss_type!r}, which averages by "
                f"{averaging!r}: leave it out, or set loss_type='clip', which works with any."
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

    def _correction(self) -> Correction | None:
        asked = self.importance_sampling_correction
        if not (self.use_vllm if asked is None else asked):
            return None
        bounds = (self.importance_sampling_clip_min, self.importance_sampling_clip_max)
        return Correction(self.importance_sampling_mode, *bounds)


@dataclass(frozen=True)
class LossType:
    """A function that makes the surrogate from the options, and the averaging (None: that of `loss_aggregation`)."""

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
"""Values of `loss_type` → surrogate and averaging. "clip" leaves the averaging to `loss_aggregation`."""


class GRPOTrainer(OnlineTrainer):
    """Sample groups of completions, and raise the probability of those whose reward is above their group's mean.

    Arguments: see `OnlineTrainer`.
    """

    config_class = GRPOConfig
    args: GRPOConfig
