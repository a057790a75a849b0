"""Online DPO: preference optimisation on pairs that the policy itself sampled.

    y⁺ = argmax_i r(x, y_i),   y⁻ = argmin_i r(x, y_i),        loss = DPO(y⁺, y⁻)

Guo et al. 2024, arXiv:2402.04792, Algorithm 1, with the judgement given as a reward; of more than two samples the best and
the worst make the pair. A group whose rewards are all equal, or with fewer than two known, makes none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl.algorithms.dpo import DPO
from trl.types import Algorithm, Experience, Learnable, Metrics, Scores


@dataclass(frozen=True)
class OnlineDPO(Algorithm):
    """The algorithm as an object. Adds the signal `preferred` `[N]`: 1 for y⁺, −1 for y⁻, 0 for others."""

    dpo: DPO = field(default_factory=DPO)
    """The loss of a pair."""

    @property
    def needs_reference(self) -> bool:
        return self.dpo.needs_reference

    def advantages(self, experience: Experience) -> Experience:
        """Which completion of each group is the better one, and which the worse."""
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
        """Loss `[P]` of the batch's pairs, better completion first, and metrics."""
        return self.dpo.loss(scores, batch)
