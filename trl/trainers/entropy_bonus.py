"""The entropy bonus of a step: the mean over the tokens it acts on, however the rest of the loss is averaged.

    loss = Σ weight · loss_token − α · mean_t H_t

A loss is averaged by the weights of its window. What a token's entropy is multiplied by, so that those weights make a mean
over tokens of it, is its share. S sequences of the window, T their tokens, E those that the bonus acts on, L a
sequence's, C the constant:

    token   T / E        sequence   L S / E        constant   C S / E        sum   S / E
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trl.algorithms.entropy_control import AdaptiveEntropy
from trl.types import Batch, Completion, Scores

SHARES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "token": lambda sequences, tokens, constant: tokens,
    "sequence": lambda sequences, tokens, constant: sequences,
    "constant": lambda sequences, tokens, constant: constant * sequences,
    "sum": lambda sequences, tokens, constant: sequences,
}


def count_tokens(completions: Sequence[Completion]) -> Tensor:
    """`[3]`: sequences with scored tokens, those tokens, and the ones that the bonus acts on."""
    scored = [[1] * len(c) if c.mask is None else list(c.mask) for c in completions]
    acts = [c.signals.get("high_entropy", m) for c, m in zip(completions, scored, strict=True)]
    acting = sum(a * b for m, h in zip(scored, acts, strict=True) for a, b in zip(m, h, strict=True))
    return torch.tensor([sum(map(any, scored)), sum(map(sum, scored)), acting], dtype=torch.float64)


def share(counts: Tensor, aggregation: str, constant: int) -> Tensor:
    """The share of a token, but for L, from the `counts` of a window."""
    sequences, tokens, acting = counts
    return (SHARES[aggregation](sequences, tokens, constant) / acting.clamp(min=1)).float()


class EntropyMeter:
    """The mean entropy of the tokens that the bonus acts on, over an optimizer step and all processes."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, scores: Scores, batch: Batch) -> None:
        acts = batch.mask * batch.signals.get("high_entropy", batch.mask)
        sums = torch.stack([(scores.entropy.detach() * acts).sum(), acts.sum()]).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def updated(self, control: AdaptiveEntropy, sum_over_processes: Callable[[Tensor], Tensor]) -> AdaptiveEntropy:
        """The controller after the step whose entropies were added; unchanged by one that came out as no number."""
        total, count = sum_over_processes(self.sums).tolist()
        self.sums = None
        return control.updated(total / max(count, 1.0)) if math.isfinite(total) else control
