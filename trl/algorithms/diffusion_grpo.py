"""GRPO on the steps of denoising, with the KL to the reference as it is and not as an estimate.

    A_i     = clip((r_i − mean(r_1…r_G)) / std(r), −c, c)                 G pictures of one prompt
    loss_it = −min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) + β (μ_θ − μ_ref)² / 2s_t²

Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818. Policy and reference draw a step with the same noise, so that their
KL is the distance of two means. ρ and KL are means over the dimensions of a latent, for which ε = 1e-4 and β about 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from trl.algorithms.grpo import GRPO
from trl.algorithms.surrogates import Clip, Surrogate
from trl.types import Experience, Learnable, Metrics, Scores


@dataclass(frozen=True, kw_only=True)
class DiffusionGRPO(GRPO):
    """The algorithm as an object. `scores.extras` hold `kl` `[N,C]`, the exact KL of each step, where `beta` is not 0."""

    surrogate: Surrogate = field(default_factory=lambda: Clip(1e-4, 1e-4))
    """How ratios are kept in bounds."""
    advantage_clip: float = 5.0
    """c: bound of advantages."""

    def advantages(self, experience: Experience) -> Experience:
        """Advantages `[N]`, clipped to ±c."""
        experience = super().advantages(experience)
        found = experience.signals["advantages"].clamp(-self.advantage_clip, self.advantage_clip)
        return experience.with_signals(advantages=found)

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]`, and metrics."""
        loss, metrics = GRPO.loss(replace(self, beta=0.0), scores, batch)
        if not self.beta:
            return loss, metrics
        kl = scores.extras["kl"]
        return loss + self.beta * kl, {**metrics, "kl": kl.detach()}
