"""DDPO, denoising diffusion policy optimisation: PPO's clipped surrogate on every denoising step, rewards standardised.

    A    = clip((r − mean r) / std r, −c, c)              mean, std over the batch, or over past rewards of the prompt
    loss = −min(ρ_t A, clip(ρ_t, 1 − ε, 1 + ε) A)         ρ_t = π(x_{t+1} | x_t) / π_old(x_{t+1} | x_t)

Black et al. 2023, arXiv:2305.13301, section 4.3 and appendix. log ρ is the mean over the dimensions of a latent, for which
ε = 1e-4. Standard deviations are those of the population (divided by N), as in the authors' code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl.algorithms.policy_gradient import clipped_surrogate, is_clipped, k2, log_ratio
from trl.errors import ConfigError
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.types import Algorithm, Experience, Learnable, Metrics, Scores

BATCH_EPSILON, PROMPT_EPSILON = 1e-8, 1e-6
"""ε added to the standard deviation of a batch's rewards, and of a prompt's past rewards, before dividing by it."""


@dataclass(frozen=True, kw_only=True)
class DDPO(Algorithm):
    """DDPO as an algorithm of an online trainer: computes advantages, and the loss of every denoising step.

    Signals it reads: `old_logprobs` `[N,C]`; `prompt_mean` and `prompt_std` `[N]` where rewards are standardised by prompt
    (see `PromptStatistics`). Signal it adds: `advantages` `[N]`.
    """

    clip_range: float = 1e-4
    """ε: how far a ratio may move from 1 before it is clipped."""
    advantage_clip: float = 5.0
    """c: advantages are clipped to [−c, c]."""

    def __post_init__(self) -> None:
        check_bounds(self)

    def advantages(self, experience: Experience) -> Experience:
        """Standardised rewards `[N]`, clipped to ±c."""
        rewards, signals = experience.rewards, experience.signals
        if "prompt_mean" in signals:
            found = (rewards - signals["prompt_mean"]) / signals["prompt_std"]
        else:
            found = standardized(rewards)
        return experience.with_signals(advantages=found.clamp(-self.advantage_clip, self.advantage_clip))

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]`, and metrics: the share of clipped steps, and ½ (log ρ)², an estimate of KL(π_old ‖ π)."""
        ratios = log_ratio(scores.logprobs, batch.signals["old_logprobs"])
        advantages = batch.signals["advantages"][:, None]
        bounds = {"low": self.clip_range, "high": self.clip_range}
        metrics = {
            "approx_kl": k2(scores.logprobs.detach(), batch.signals["old_logprobs"]),
            "clipfrac": is_clipped(ratios, advantages, **bounds),
        }
        return -clipped_surrogate(ratios, advantages, **bounds), metrics


@shapes(rewards="N")
def standardized(rewards: Tensor) -> Tensor:
    """(r − mean) / (std + 1e-8) of `rewards [N]`."""
    exact = rewards.double()
    centred = exact - exact.mean()
    return (centred / (exact.std(correction=0) + BATCH_EPSILON)).to(rewards.dtype)


class PromptStatistics:
    """Running mean and standard deviation of each prompt's rewards; those of the batch until a prompt has enough rewards.

    buffer_size   number of latest rewards that are kept per prompt
    min_count     a prompt with fewer rewards than this uses the statistics of the batch
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        if buffer_size < 1 or not 1 <= min_count <= buffer_size:
            raise ConfigError(
                f"Per-prompt reward statistics need 1 ≤ min_count ≤ buffer_size, got min_count={min_count} and "
                f"buffer_size={buffer_size}: lower min_count, or raise buffer_size."
            )
        self.buffer_size, self.min_count = buffer_size, min_count
        self.rewards: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Add `rewards [N]` to the buffers of `prompts`; return the mean and standard deviation `[N]` for each reward."""
        exact = rewards.double()
        for prompt, reward in zip(prompts, exact.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        batch = _moments(exact)
        found = {prompt: self._of(prompt, batch) for prompt in set(prompts)}
        mean, std = zip(*(found[prompt] for prompt in prompts), strict=True)
        return torch.stack(mean).to(rewards.dtype), torch.stack(std).to(rewards.dtype)

    def _of(self, prompt: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        known = self.rewards[prompt]
        return _moments(torch.tensor(known, dtype=torch.float64)) if len(known) >= self.min_count else batch

    def state_dict(self) -> dict[str, Any]:
        return {prompt: [*rewards] for prompt, rewards in self.rewards.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self.rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}


def _moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    return rewards.mean(), rewards.std(correction=0) + PROMPT_EPSILON
