"""Pack weights into a sequence of large byte buffers, with the same boundaries as vLLM.

    weight 1 │ weight 2 │ weight 3 ║ weight 4 │ …        a buffer ends after the weight that makes it exceed the limit

Sender and receiver compute the boundaries from the names, dtypes and shapes that both know, so that only bytes are sent.
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
    """Name, dtype and shape of a weight, which the receiver learns before the bytes arrive."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> WeightMeta:
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def weights_meta(model: nn.Module) -> list[WeightMeta]:
    """Metadata of all weights of the policy, with adapters merged, in the order of `gathered_parameters`; a collective call.

    Raises ModelError for models whose checkpoints have other weight names or shapes than the model in memory: servers expect
    those of the checkpoint, which need all weights at once.
    """
    found = [WeightMeta.of(name, tensor) for name, tensor in gathered_parameters(model)]
    base = base_of(policy_of(model))
    empty = {meta.name: torch.empty(meta.shape, dtype=meta.dtype, device="meta") for meta in found}
    saved = revert_weight_conversion(base, dict(empty))
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in empty.items()}:
        raise ModelError(
            f"Servers expect the weights of {type(base).__name__} with the names and shapes of its checkpoints, which differ from "
            "those in memory: send the weights through a folder (leave out rollout_sync='nccl')."
        )
    return found


def update_info(metas: Sequence[WeightMeta]) -> dict[str, list]:
    """The metadata of the weights, in the form in which vLLM's route `/update_weights` takes them."""
    return {
        "names": [meta.name for meta in metas],
        "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metas],
        "shapes": [list(meta.shape) for meta in metas],
    }


def buffer_sizes(sizes: Sequence[int], limit: int) -> list[int]:
    """The size of every buffer in bytes, from the sizes of the weights and the limit of a buffer."""
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
    """Yield the buffers [bytes] uint8 on `device`. Raises ModelError if a weight differs from its metadata in `metas`."""
    sizes = iter(buffer_sizes([meta.size for meta in metas], limit))
    buffer, filled = torch.empty(0, dtype=torch.uint8), 0
    for (name, tensor), meta in zip(weights, metas, strict=True):
        if WeightMeta.of(name, tensor) != meta:
            raise ModelError(
                f"The weight {name} is now {tensor.dtype} {tuple(tensor.shape)}, but {meta} was announced to the servers."
            )
        if filled == buffer.numel():
            buffer, filled = torch.empty(next(sizes), dtype=torch.uint8, device=device), 0
        buffer[filled : filled + meta.size] = tensor.contiguous().view(-1).view(torch.uint8)
        filled += meta.size
        if filled == buffer.numel():
            yield buffer
