"""PPO, proximal policy optimisation, of language models.

    r_t = −β KL_t + [t is the last token] · score          β: strength of the KL penalty towards the reference
    A, R = GAE(r, V; γ, λ),   A whitened                   see `trl.algorithms.gae`
    loss = −min(ρ A, clip(ρ, 1 ± ε) A) + c · ½ max((V − R)², (clip(V, V_old ± ε_v) − R)²)

Ziegler et al. 2019, arXiv:1909.08593 (rewards); Schulman et al. 2017, arXiv:1707.06347, Eq. 7 and 9 (loss). ρ = π/π_old, where
π_old and V_old are policy and values at sampling time. An action is a token, its state all tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trl.algorithms.gae import gae
from trl.algorithms.kl_control import AdaptiveKL, KLController
from trl.algorithms.moments import RunningMoments
from trl.algorithms.policy_gradient import clipped_surrogate, is_clipped, k1, k2, log_ratio, ratio
from trl.algorithms.signals import required
from trl.errors import ConfigError
from trl.ops.reduce import at_last, masked_mean, masked_whiten
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.option_types import check_choices
from trl.types import Algorithm, Experience, Learnable, Metrics, Scores

LOGPROBS = ("old_logprobs", "ref_logprobs")

PENALTIES: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    "kl": (LOGPROBS, k1),
    "abs": (LOGPROBS, lambda logprobs, ref_logprobs: k1(logprobs, ref_logprobs).abs()),
    "mse": (LOGPROBS, k2),
    "full": (("full_kl",), lambda divergence: divergence),
}
"""By the names of `kl_penalty`: the signals `[N,C]` that a token's KL is computed from, and the formula."""


@shapes(scores="N", kl="N C", mask="N C")
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, coefficient: float) -> Tensor:
    """Rewards r_t `[N,C]`: −β KL_t `[N,C]`, plus the completion's score `[N]` on its last unmasked token."""
    return at_last(scores, mask) - coefficient * kl * mask


@shapes(values="...", old_values="...")
def clip_values(values: Tensor, old_values: Tensor, *, cliprange: float) -> Tensor:
    """clip(V, V_old − ε_v, V_old + ε_v), `[N,C]`, where V_old are the values at sampling time."""
    return torch.clamp(values, old_values - cliprange, old_values + cliprange)


@shapes(values="...", old_values="...", returns="...")
def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), `[N,C]`: moving V by more than ε does not lower the loss."""
    clipped = clip_values(values, old_values, cliprange=cliprange)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


@dataclass(kw_only=True)
class PPOOptions:
    """Hyperparameters of advantages and loss; the trainer's configuration inherits them."""

    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """Estimate of a token's KL: "kl" (log-ratio), "abs" (its absolute value), "mse" (half its square), "full" (exact)."""

    whiten_rewards: bool = False
    """Scale the token rewards of a batch to variance 1, without shifting their mean."""

    gamma: float = 1.0
    """Discount of a token's later rewards."""

    lam: float = 0.95
    """λ of generalised advantage estimation (arXiv:1506.02438): 0 relies on the values, 1 on the rewards."""

    cliprange: float = 0.2
    """ε: probability ratios are clipped to [1 − ε, 1 + ε]; a token beyond that gives no gradient."""

    cliprange_value: float = 0.2
    """ε_v: values are clipped to within ε_v of those at sampling time."""

    vf_coef: float = 0.1
    """c: weight of the value loss."""

    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""

    use_score_norm: bool = False
    """Also subtract the scores' running mean; needs `use_score_scaling`."""

    score_clip: float | None = None
    """Clip scores to ± this, after scaling. None: no clipping."""

    ratio_threshold: float = 10
    """Skip micro-batches whose mean probability ratio is above this. A mini-batch is one micro-batch unless it has to
    be split."""


@dataclass(kw_only=True)
class PPO(PPOOptions, Algorithm):
    """PPO as an algorithm of an online trainer: advantages, loss, KL coefficient and statistics of scores.

    Signals it reads, `[N,C]`: `old_logprobs`, `values`, `ref_logprobs` (or `full_kl` if `kl_penalty` is "full"), and
    optionally `dense_rewards`, rewards of tokens that replace the completions' scores.
    Signals it adds: `scores` `[N]`; `kl`, `token_rewards`, `advantages`, `returns` `[N,C]`.
    """

    controller: KLController = field(default_factory=AdaptiveKL)
    """Controller of β, the coefficient of the KL penalty."""
    moments: RunningMoments = field(default_factory=RunningMoments)
    """Running mean and standard deviation of the scores, with `use_score_scaling`."""

    needs_reference = True
    needs_values = True

    def __post_init__(self) -> None:
        check_choices(self)
        check_bounds(self)
        if self.use_score_norm and not self.use_score_scaling:
            raise ConfigError("use_score_norm=True works only with scaled scores: set use_score_scaling=True as well.")

    # ---- state ----

    def after_round(self, experience: Experience) -> PPO:
        """Return the algorithm with β updated by the mean KL of these responses, and the moments by their scores."""
        kl = (experience.signals["kl"] * experience.mask).sum(1)
        controller = self.controller.updated(kl.mean().item(), len(kl))
        return replace(self, controller=controller, moments=self._moments_with(experience))

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.controller.coefficient, "moments": asdict(self.moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller = replace(self.controller, coefficient=state["kl_coef"])
        self.moments = RunningMoments(**state["moments"])

    def _moments_with(self, experience: Experience) -> RunningMoments:
        scores = experience.rewards.nan_to_num(0.0)
        return self.moments.updated(scores) if self.use_score_scaling else self.moments

    # ---- advantages ----

    def advantages(self, experience: Experience) -> Experience:
        """Add scores, KL, token rewards, advantages and returns, computed from the completions' rewards `[N]`."""
        return self.with_advantages(self.with_token_rewards(self.with_scores(experience)))

    def with_scores(self, experience: Experience) -> Experience:
        """Add `scores` `[N]`: rewards after scaling and clipping, 0 where no reward function applied."""
        scores = experience.rewards.nan_to_num(0.0)
        if self.use_score_scaling:
            scores = self._moments_with(experience).scaled(scores, centred=self.use_score_norm)
        clip = self.score_clip
        return experience.with_signals(scores=scores if clip is None else scores.clamp(-clip, clip))

    def with_token_rewards(self, experience: Experience) -> Experience:
        """Add `kl` and `token_rewards` `[N,C]`, from `scores`."""
        mask = experience.mask
        kl = self.kl(experience) * mask
        scores, dense = experience.signals["scores"], experience.signals.get("dense_rewards")
        last = scores if dense is None else torch.zeros_like(scores)
        rewards = token_rewards(last, kl, mask, coefficient=self.controller.coefficient)
        rewards = rewards if dense is None else rewards + dense * mask
        return experience.with_signals(kl=kl, token_rewards=rewards)

    def with_advantages(self, experience: Experience) -> Experience:
        """Add `advantages`, whitened over the mask, and `returns` `[N,C]`, by GAE from `token_rewards` and `values`."""
        mask, rewards = experience.mask, experience.signals["token_rewards"]
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, mask, keep_mean=True)
        advantages, returns = gae(rewards, experience.signals["values"], mask, gamma=self.gamma, lam=self.lam)
        return experience.with_signals(advantages=masked_whiten(advantages, mask), returns=returns)

    def kl(self, experience: Experience) -> Tensor:
        """KL of every token `[N,C]`, by the estimate that `kl_penalty` names."""
        names, penalty = PENALTIES[self.kl_penalty]
        return penalty(*(required(experience, name, by=f"kl_penalty={self.kl_penalty!r}") for name in names))

    # ---- loss ----

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]`, 0 where the mean ratio is above `ratio_threshold`, and metrics `[N,C]`; needs `scores.value`."""
        assert scores.value is not None, 'score the batch with want={"value"}'
        signals = batch.signals
        log_ratio_t = log_ratio(scores.logprobs, signals["old_logprobs"])
        policy = -clipped_surrogate(log_ratio_t, signals["advantages"], low=self.cliprange, high=self.cliprange)
        value = value_loss(scores.value, signals["values"], signals["returns"], cliprange=self.cliprange_value)
        loss = policy + self.vf_coef * value
        terms = {"loss/policy": policy.detach(), "loss/value": value.detach(), "loss/total": loss.detach()}
        metrics = terms | self.metrics(scores, batch)
        return loss * (metrics["policy/skipped"] == 0), metrics

    @torch.no_grad()
    def metrics(self, scores: Scores, batch: Learnable) -> Metrics:
        """Metrics `[N,C]`: how far the policy has moved since sampling, and how well the values predict the returns."""
        signals, eps = batch.signals, self.cliprange
        log_ratio_t = log_ratio(scores.logprobs, signals["old_logprobs"])
        ratios, error = ratio(log_ratio_t), (scores.value - signals["returns"]).square()
        skipped = ~(masked_mean(ratios, batch.mask) <= self.ratio_threshold)
        clipped = clip_values(scores.value, signals["values"], cliprange=self.cliprange_value)
        entropy = {} if scores.entropy is None else {"policy/entropy": scores.entropy.detach()}
        return entropy | {
            "policy/approxkl": log_ratio_t.square() / 2,
            "policy/policykl": -log_ratio_t,
            "policy/clipfrac": is_clipped(log_ratio_t, signals["advantages"], low=eps, high=eps),
            "policy/advantages_mean": signals["advantages"],
            "policy/ratio": ratios,
            "policy/skipped": skipped.to(error.dtype).expand_as(error),
            "val/vpred": scores.value.detach(),
            "val/error": error,
            "val/clipfrac": ((clipped - signals["returns"]).square() > error).to(error.dtype),
        }


@shapes(logits="M V", ref_logits="M V")
def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Σ_v π(v) [log π(v) − log π_ref(v)], `[M]` from logits `[M,V]`: the exact KL over the vocabulary."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)
