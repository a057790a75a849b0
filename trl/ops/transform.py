"""What becomes of a head's output before its softmax, and which statistics of the distribution can be asked for.

z = softcap · tanh(scale · raw / softcap) / temperature        (both transforms optional)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIFFERENTIABLE = ("logprobs", "entropy", "mean_logprob")
DETACHED = ("collision", "greedy")
STATISTICS = DIFFERENTIABLE + DETACHED


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What an architecture does to the head's output, and the temperature: Gemma 2's soft-cap, the scale of Cohere's and Granite's."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        z = raw * self.scale if self.scale != 1.0 else raw
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.temperature != 1.0 else z

    def derivative(self, z: Tensor) -> Tensor | float:
        """∂z/∂raw, from z."""
        if self.softcap is None:
            return self.scale / self.temperature
        capped = z * (self.temperature / self.softcap)
        return (1 - capped.square()) * (self.scale / self.temperature)
