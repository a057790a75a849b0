"""The common base of batches of all diffusion methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from trl.diffusion.denoiser import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureBatch:
    """M pictures, pairs or denoising steps for one forward pass: a `StepBatch` in which each is like a completion of one token.

    texts     [M,…] outputs of the text encoders for each one's prompt
    mask      [M,1] 1 if it is trained on
    signals   [M] or [M,1]
    weight    [M,1] or None: weights that sum to 1 over the accumulation window and all processes
    tokens    number of those that are trained on, on the host
    """

    ON_HOST: ClassVar[tuple[str, ...]] = ()
    """Fields that stay on the host: they are indices into tensors there."""

    texts: Text
    mask: Tensor
    signals: Mapping[str, Tensor]
    weight: Tensor | None = None
    tokens: int = 0

    @property
    def example(self) -> Tensor:
        return torch.arange(len(self.mask))

    @property
    def positions(self) -> int:
        return len(self.mask)

    def masked_out(self) -> Self:
        """The batch with a mask of zeros, so that nothing is trained on."""
        return replace(self, mask=self.mask * 0)

    def to(self, device: Any) -> Self:
        names = [field.name for field in fields(self) if field.name not in self.ON_HOST]
        return replace(self, **{name: _moved(getattr(self, name), device) for name in names})


def learned_of(items: Sequence[Any]) -> dict[str, Any]:
    """The fields `mask` and `tokens` of a batch of these items, by their attribute `is_learned`."""
    mask = torch.tensor([[float(item.is_learned)] for item in items])
    return {"mask": mask, "tokens": int(mask.sum())}


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value
