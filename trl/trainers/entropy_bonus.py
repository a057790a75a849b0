"""The entropy bonus in a trainer's loss: always a mean over tokens, however the rest of the loss is averaged.

    loss = Σ_t weight_t · (loss_t − α H_t / (E · weight_t)) = Σ_t weight_t · loss_t − α · mean_t H_t

The weights are those of the accumulation window. E is the number of its tokens that the bonus acts on: all completion
tokens, or those of the signal `high_entropy` if the algorithm adds one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from trl.algorithms.entropy_control import EntropyBonus
from trl.types import Batch, Completion, Scores


def count_tokens(completions: Sequence[Completion]) -> Tensor:
    """The number of tokens that the bonus acts on."""
    masks = [[1] * len(c) if c.mask is None else c.mask for c in completions]
    acts = [c.signals.get("high_entropy", mask) for c, mask in zip(completions, masks, strict=True)]
    pairs = (pair for mask, act in zip(masks, acts, strict=True) for pair in zip(mask, act, strict=True))
    return torch.tensor(sum(m * a for m, a in pairs), dtype=torch.float64)


@runtime_checkable
class HasEntropyBonus(Protocol):
    """An algorithm that may have an entropy bonus (None: it is off)."""

    entropy_bonus: EntropyBonus | None


class BonusOfSteps:
    """Applies an algorithm's entropy bonus, and adapts its coefficient to the mean entropy of each step over all processes."""

    def __init__(self, bonus: EntropyBonus) -> None:
        self.bonus = bonus
        self.sums: Tensor | None = None

    def __call__(self, loss: Tensor, scores: Scores, batch: Batch) -> Tensor:
        """Subtract the bonus from the losses `[N,C]` of a batch; its signal `bonus_tokens` is E."""
        counts = batch.weight > 0
        acts = counts * batch.signals.get("high_entropy", batch.mask)
        policy_loss = (loss.detach() * batch.weight).sum()
        sums = torch.stack([policy_loss, (scores.entropy.detach() * acts).sum(), acts.sum()]).double()
        self.sums = sums if self.sums is None else self.sums + sums
        whole = batch.signals["bonus_tokens"].clamp(min=1)[:, None] * batch.weight
        return loss - self.bonus.applied * acts * scores.entropy / whole.masked_fill(~counts, 1)

    def end_step(self, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Update the coefficient by the mean entropy of the step, unless it is NaN. Returns the values to log."""
        if self.sums is None:
            return {}
        policy_loss, total, count = sum_over_processes(self.sums).tolist()
        self.sums = None
        if math.isfinite(total):
            self.bonus = self.bonus.updated(total / max(count, 1.0))
        found = {"policy_loss": policy_loss, "entropy_coef": self.bonus.coefficient}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.bonus.coefficient, "entropy": self.bonus.entropy}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.bonus = replace(self.bonus, **state)
