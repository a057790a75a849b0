"""Weights as a row of large buffers of bytes, cut where vLLM cuts them.

    weight 1 │ weight 2 │ weight 3 ║ weight 4 │ …        a buffer ends with the weight that takes it beyond the limit

Sender and receiver cut by sizes alone, which both know from names, types and shapes: nothing but bytes is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from trl.errors import ModelError
from trl.models.gathering import base_of, gathered_parameters, policy_of


@dataclass(frozen=True)
class WeightMeta:
    """What is known of a weight before it is sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> WeightMeta:
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def weights_meta(model: nn.Module) -> list[WeightMeta]:
    """Of all weights of the policy, adapters merged, in the order of `gathered_parameters`. All processes take part.

    Raises ModelError for models whose checkpoints have other names or shapes: those are known once all weights are there.
    """
    found = [WeightMeta.of(name, tensor) for name, tensor in gathered_parameters(model)]
    base = base_of(policy_of(model))
    empty = {meta.name: torch.empty(meta.shape, dtype=meta.dtype, device="meta") for meta in found}
    saved = revert_weight_conversion(base, dict(empty))
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in empty.items()}:
        raise ModelError(
            f"Checkpoints of {type(base).__name__} hold its weights in other shapes or under other names, which servers read: "
            "send them through a folder (leave out rollout_sync='nccl')."
        )
    return found


def update_info(metas: Sequence[WeightMeta]) -> dict[str, list]:
    """What vLLM's route `/update_weights` is told of the weights to come."""
    return {
        "names": [meta.name for meta in metas],
        "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metas],
        "shapes": [list(meta.shape) for meta in metas],
    }


def buffer_sizes(sizes: Sequence[int], limit: int) -> list[int]:
    """Bytes of every buffer."""
    found, filled = [], 0
    for size in sizes:
        filled += size
        if filled > limit:
            found.append(filled)
            filled = 0
    return [*found, filled] if filled else found


def packed(
    weights: Iterable[tuple[str, Tensor]], metas: Sequence[WeightMeta], limit: int, device: torch.device
) -> Iterator[Tensor]:
    """The buffers on `device`, each [bytes], of weights that have to be those of `metas`. Raises ModelError where not."""
    sizes = iter(buffer_sizes([meta.size for meta in metas], limit))
    buffer, filled = torch.empty(0, dtype=torch.uint8), 0
    for (name, tensor), meta in zip(weights, metas, strict=True):
        if WeightMeta.of(name, tensor) != meta:
            raise ModelError(
                f"The weight {name} is {tensor.dtype} {tuple(tensor.shape)} now, and {meta} was announced to the servers."
            )
        if filled == buffer.numel():
            buffer, filled = torch.empty(next(sizes), dtype=torch.uint8, device=device), 0
        buffer[filled : filled + meta.size] = tensor.contiguous().view(-1).view(torch.uint8)
        filled += meta.size
        if filled == buffer.numel():
            yield buffer
