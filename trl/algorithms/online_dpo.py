"""Online DPO: the DPO loss on pairs of completions that the policy samples during training.

    y⁺ = argmax_i r(x, y_i),   y⁻ = argmin_i r(x, y_i),        loss = DPO(y⁺, y⁻)

Guo et al. 2024, arXiv:2402.04792, Algorithm 1, with a reward in place of the annotator; from more than two samples, the best
and the worst form the pair. A group whose rewards are all equal, or that has fewer than two known ones, gives no pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl.algorithms.dpo import DPO
from trl.types import Algorithm, Experience, Learnable, Metrics, Scores


@dataclass(frozen=True)
class OnlineDPO(Algorithm):
    """Online DPO as an algorithm of an online trainer. Adds the signal `preferred` `[N]`: y⁺ 1, y⁻ −1, others 0."""

    dpo: DPO = field(default_factory=DPO)
    """Loss of the pairs."""

    @property
    def needs_reference(self) -> bool:
        return self.dpo.needs_reference

    def advantages(self, experience: Experience) -> Experience:
        """Add the signal `preferred`, which marks the best and the worst completion of each group."""
        preferred = torch.zeros_like(experience.rewards)
        for number in experience.group.unique():
            mine = (experience.group == number).nonzero().flatten()
            rewards = experience.rewards[mine]
            best = rewards.nan_to_num(nan=-torch.inf).argmax()
            worst = rewards.nan_to_num(nan=torch.inf).argmin()
            if rewards[best] > rewards[worst]:
                preferred[mine[best]], preferred[mine[worst]] = 1, -1
        return experience.with_signals(preferred=preferred)

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[P]` and metrics of the pairs in the batch, in which y⁺ precedes y⁻."""
        return self.dpo.loss(scores, batch)
