"""GRPO (group relative policy optimisation) and its family: policy gradients with a group baseline in place of a critic.

    A_i     = (r_i − mean(r_1…r_G)) / (std(r_1…r_G) + ε)                       G samples of one prompt
    loss_it = −min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) + β KL_it           ρ = π / π_old

Shao et al. 2024, arXiv:2402.03300, Eq. 3. The variants of later papers are independent options here:

    baseline, scale    how a reward becomes an advantage              `trl.algorithms.advantages`
    ratio_level        over what ρ is taken                           "token"; "sequence": the geometric mean over the
                                                                      completion (GSPO, arXiv:2507.18071, Eq. 7); "whole":
                                                                      the product over it
    surrogate          how ρ is clipped, or bounded otherwise         `trl.algorithms.surrogates`
    averaging          equal weight of tokens or of completions       the trainer's weights, `trl.ops.reduce`
    KL                 in the loss (k1, k2, k3, or unbiased) or in the reward
    entropy            a bonus; loss on the tokens of highest entropy only (arXiv:2506.01939)
    correction         importance weights of off-policy samples       `trl.algorithms.importance`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trl.algorithms.advantages import Baseline, Scale, advantages
from trl.algorithms.entropy_control import EntropyBonus
from trl.algorithms.importance import Correction
from trl.algorithms.policy_gradient import KL, KLEstimate, k1, log_ratio, ratio
from trl.algorithms.surrogates import Clip, Surrogate, Terms, mean_over_completion
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.option_types import check_choices
from trl.types import Algorithm, Experience, Learnable, Metrics, Scores

RatioLevel = Literal["token", "sequence", "whole"]

RATIO_LEVELS: dict[RatioLevel, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio_t, mask: log_ratio_t,
    "sequence": mean_over_completion,
    "whole": lambda log_ratio_t, mask: log_ratio_t.sum(-1, keepdim=True),
}
"""Functions from token log-ratios `[N,C]`, 0 where masked, and the mask `[N,C]` to log ρ, `[N,C]` or `[N,1]`."""


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """GRPO as an algorithm of an online trainer: computes advantages from rewards, and the loss of every token.

    Signals it reads, `[N,C]`: `old_logprobs`; `ref_logprobs` if `beta` is not 0; `sampler_logprobs` with a `correction` or
    an `off_policy_threshold`; `entropy` of the rollout batch if `top_entropy` < 1. Signals it adds: `advantages` `[N]`,
    `high_entropy` `[N,C]`. The trainer adds the entropy bonus to the loss.
    """

    baseline: Baseline = "group"
    """Baseline that is subtracted from the reward: a name in `BASELINES`."""
    scale: Scale = "group"
    """Scale that the advantage is divided by: a name in `SCALES`."""
    ratio_level: RatioLevel = "token"
    """Whether ρ is the ratio of a token or of the completion: a name in `RATIO_LEVELS`."""
    surrogate: Surrogate = field(default_factory=Clip)
    """Surrogate objective, which bounds the ratios ρ."""
    beta: float = 0.0
    """β: coefficient of the KL penalty towards the reference policy."""
    kl: KLEstimate = "k3"
    """Per-token KL estimator in the loss: a name in `trl.algorithms.policy_gradient.KL`."""
    unbiased_kl: bool = True
    """Multiply the KL estimate by ρ, so that its gradient is an unbiased one of the reverse KL (arXiv:2512.02556, Eq. 7)."""
    kl_in_reward: bool = False
    """Subtract β Σ_t log π_old/π_ref from the reward, in place of a KL term in the loss."""
    entropy_bonus: EntropyBonus | None = None
    """Controller of the entropy bonus on the trained tokens. None: no bonus."""
    top_entropy: float = 1.0
    """Fraction of the rollout batch's tokens that are trained on: those of highest entropy."""
    off_policy_threshold: float | None = None
    """Mask completions with A < 0 whose mean log π_sampler/π exceeds this (arXiv:2512.02556, Eq. 9). None: mask none."""
    correction: Correction | None = None
    """Importance weights that correct for a sampler whose probabilities differ from those of π_old."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_bounds(self)

    @property
    def needs_reference(self) -> bool:
        return self.beta != 0

    @property
    def needs_entropy(self) -> bool:
        return self.top_entropy < 1

    @property
    def needs_old_logprobs(self) -> bool:
        return self.correction is not None

    # ---- advantages ----

    def advantages(self, experience: Experience) -> Experience:
        """Add the signals `advantages` `[N]` and, with `top_entropy`, `high_entropy` `[N,C]` (1 or 0)."""
        rewards = self.kl_penalised_rewards(experience)
        found = advantages(rewards, experience.group, baseline=self.baseline, scale=self.scale)
        experience = experience.with_signals(advantages=found)
        if not self.needs_entropy:
            return experience
        entropy = experience.signals["entropy"]
        threshold = quantile(entropy[experience.mask.bool()], 1 - self.top_entropy)
        return experience.with_signals(high_entropy=(entropy >= threshold).to(entropy.dtype))

    def kl_penalised_rewards(self, experience: Experience) -> Tensor:
        """Rewards `[N]`, minus β times the KL of the completion if `kl_in_reward`."""
        if not (self.kl_in_reward and self.beta):
            return experience.rewards
        signals = experience.signals
        kl = k1(signals["old_logprobs"], signals["ref_logprobs"]) * experience.mask
        return experience.rewards - self.beta * kl.sum(-1)

    # ---- loss ----

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]`, and metrics."""
        terms = self.terms(scores, batch)
        loss = -self.surrogate(terms) * self.token_weight(terms, batch)
        metrics = {"entropy": scores.entropy.detach(), **self.surrogate.metrics(terms)}
        if self.beta and not self.kl_in_reward:
            divergence = KL[self.kl](scores.logprobs, batch.signals["ref_logprobs"])
            loss = loss + self.beta * (divergence * ratio(terms.log_ratio) if self.unbiased_kl else divergence)
        if self.beta:
            metrics["kl"] = KL["k3"](scores.logprobs.detach(), batch.signals["ref_logprobs"])
        if self.correction is not None:
            old, sampler = batch.signals["old_logprobs"], batch.signals["sampler_logprobs"]
            metrics["sampling/masked_share"] = self.correction.is_beyond(old, sampler, batch.mask)
        return loss.expand_as(batch.mask), metrics

    def terms(self, scores: Scores, batch: Learnable) -> Terms:
        """Inputs of the surrogate: log ρ at `ratio_level`, and advantages."""
        log_ratio_t = log_ratio(scores.logprobs, batch.signals["old_logprobs"]) * batch.mask
        level = RATIO_LEVELS[self.ratio_level](log_ratio_t, batch.mask)
        advantages = batch.signals["advantages"]
        return Terms(
            scores.logprobs,
            log_ratio_t,
            level,
            advantages if advantages.dim() == 2 else advantages[:, None],
            batch.mask,
        )

    def token_weight(self, terms: Terms, batch: Learnable) -> Tensor:
        """Weight of each token in the surrogate, `[N,C]` or `[N,1]`: masks and importance weights, without gradient."""
        signals = batch.signals
        share = torch.ones_like(terms.advantages)
        if self.off_policy_threshold is not None:
            drift = mean_over_completion(signals["sampler_logprobs"] - terms.logprobs.detach(), batch.mask)
            share = share * ((terms.advantages >= 0) | (drift <= self.off_policy_threshold))
        if self.needs_entropy:
            share = share * signals["high_entropy"]
        if self.correction is not None:
            share = share * self.correction(signals["old_logprobs"], signals["sampler_logprobs"], batch.mask)
        return share


@shapes(values="M")
def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of `values [M]`, linearly interpolated; unlike `torch.quantile`, for any M."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    lower = int(place)
    upper = min(lower + 1, len(ordered) - 1)
    return torch.lerp(ordered[lower], ordered[upper], place - lower)
