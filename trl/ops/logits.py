"""The names of statistics of a distribution over the vocabulary, and the transform of logits that precedes it.

    z = softcap · tanh(scale · raw / softcap) / temperature        (both transforms optional)

Gemma 2 has soft-capping (arXiv:2408.00118, section 2), Cohere and Granite a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIFFERENTIABLE = ("logprobs", "entropy", "mean_logprob")
DETACHED = ("mean_logit", "collision", "greedy")
STATISTICS = DIFFERENTIABLE + DETACHED


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Scaling, soft-capping and temperature of the head's output: the formula at the top of the file."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        z = raw * self.scale if self.scale != 1.0 else raw
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.temperature != 1.0 else z

    def derivative(self, z: Tensor) -> Tensor | float:
        """∂z/∂raw `[…,V]` from z `[…,V]`; a float if it is constant."""
        if self.softcap is None:
            return self.scale / self.temperature
        capped = z * (self.temperature / self.softcap)
        return (1 - capped.square()) * (self.scale / self.temperature)
