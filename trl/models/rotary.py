"""Length-dependent rotary embeddings, computed for each sequence of a batch separately.

    LongRoPE (arXiv:2402.13753)    other factors for sequences longer than the original training length
    dynamic NTK                    a base that grows with the number of tokens beyond that length

`transformers` uses the highest position of the whole forward pass, so every sequence gets the frequencies of the longest one
in its batch (with dynamic NTK, also of the longest one so far), and results depend on the batch. Here each sequence, which is
a run of increasing positions, gets the frequencies for its own length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trl.models.patching import is_patched, patch_forward

BY_LENGTH = ("longrope", "dynamic")
"""Kinds of rotary embeddings whose frequencies depend on the length."""


def length_dependent(config: PreTrainedConfig) -> str:
    """The `rope_type` of the model if its frequencies depend on the sequence length, else empty."""
    return next((each["rope_type"] for each in _parameters(config)), "")


def first_length(config: PreTrainedConfig) -> int:
    """Sequence length in tokens up to which frequencies do not depend on the length."""
    return min(_first_length(config, each) for each in _parameters(config))


def _parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The length-dependent entries of `rope_parameters`, which is one for all layers, or one for each type of layer."""
    given = vars(config.get_text_config()).get("rope_parameters") or {}
    return [each for each in (given, *given.values()) if isinstance(each, dict) and each.get("rope_type") in BY_LENGTH]


def _first_length(config: PreTrainedConfig, parameters: dict[str, Any]) -> int:
    if parameters["rope_type"] == "longrope":
        return parameters["original_max_position_embeddings"]
    return config.get_text_config().max_position_embeddings


def rotate_by_own_length(model: PreTrainedModel) -> None:
    """Patch the model's rotary embeddings to use the length of each sequence. A second call has no effect."""
    if not length_dependent(model.config):
        return
    for module in model.modules():
        if "rope_type" in vars(module) and not is_patched(module):
            patch_forward(module, _by_own_length())


def _by_own_length() -> Callable:
    def forward(
        self: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        kind = self.rope_type if layer_type is None else self.rope_type[layer_type]
        layer = {} if layer_type is None else {"layer_type": layer_type}
        if kind not in BY_LENGTH or position_ids.dim() != 2:
            return self._trl_plain_forward(x, position_ids, **layer)
        given = self.config.rope_parameters
        first = _first_length(self.config, given if layer_type is None else given[layer_type])
        lengths = lengths_of(position_ids).clamp(min=first)
        if kind == "longrope":  # all sequences above the original length have the same frequencies
            lengths = lengths.clamp(max=first + 1)
        found = None
        different = lengths.unique().tolist()
        for length in different:
            if kind == "dynamic":
                _forget(self, layer_type, x.device)
            cut = position_ids if length == different[-1] else position_ids.clamp(max=length - 1)
            cos, sin = _of_length(self, x, cut, length, **layer)
            own = (lengths == length)[..., None]
            found = (cos, sin) if found is None else (torch.where(own, cos, found[0]), torch.where(own, sin, found[1]))
        return found

    return forward


def lengths_of(position_ids: Tensor) -> Tensor:
    """For each position `[B,T]`, the length of its sequence: one more than the highest position of its run.

    A run ends where positions do not increase.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    run = begins.flatten().cumsum(0) - 1
    highest = position_ids.new_zeros(position_ids.numel()).scatter_reduce(0, run, position_ids.flatten(), "amax")
    return highest[run].view_as(position_ids) + 1


def _forget(module: nn.Module, layer_type: str | None, device: torch.device) -> None:
    """Reset the cache of dynamic NTK, which keeps the frequencies of the longest sequence so far."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
    original = getattr(module, f"{prefix}original_inv_freq").to(device)
    module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)


def _of_length(module: nn.Module, x: Tensor, position_ids: Tensor, length: int, **layer: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, with the frequencies for a sequence of `length` tokens."""
    # The last position of such a sequence is appended, since the module takes the length from the highest position.
    last = position_ids.new_full((len(position_ids), 1), length - 1)
    cos, sin = module._trl_plain_forward(x, torch.cat([position_ids, last], 1), **layer)
    return cos[:, :-1], sin[:, :-1]
