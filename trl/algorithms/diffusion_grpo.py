"""GRPO on the denoising steps of a diffusion model, with the exact KL to the reference in place of an estimate.

    A_i     = clip((r_i − mean(r_1…r_G)) / std(r), −c, c)                 G pictures of one prompt
    loss_it = −min(ρ_it A_i, clip(ρ_it, 1 − ε, 1 + ε) A_i) + β (μ_θ − μ_ref)² / 2s_t²

Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818. Each step of policy and reference is a Gaussian of
the same variance s_t², so its KL follows from the two means μ. log ρ and KL are averaged over the dimensions of a latent,
which is why ε = 1e-4 and β about 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from trl.algorithms.grpo import GRPO
from trl.algorithms.surrogates import Clip, Surrogate
from trl.types import Experience, Learnable, Metrics, Scores


@dataclass(frozen=True, kw_only=True)
class DiffusionGRPO(GRPO):
    """GRPO for diffusion models. Where `beta` is not 0, `scores.extras` must hold `kl` `[N,C]`, the exact KL of each step."""

    surrogate: Surrogate = field(default_factory=lambda: Clip(1e-4, 1e-4))
    """Surrogate objective, which bounds the ratios ρ."""
    advantage_clip: float = 5.0
    """c: advantages are clipped to [−c, c]."""

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
