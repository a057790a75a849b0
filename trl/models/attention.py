"""Attention masks of the shared layout: a token attends to its prompt, and to its own completion up to itself.

Position i attends to position j iff   j ≤ i,   sequence[i] = sequence[j],   and   branch[j] ∈ {0, branch[i]},
or both are in one bidirectional block,
and in a layer with a sliding window W   offset[i] − offset[j] < W.

Branch 0 is the prompt, branch k its k-th completion. Padding is a sequence of its own. Some models attend bidirectionally
within blocks: an image, or the whole prompt. A model with several kinds of layers gets a dict of masks, one for each kind,
by the names of its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, or_masks
from transformers import PreTrainedConfig

from trl.models.block_masks import block_mask
from trl.types import PerToken, Segments
from trl.vision.families import family_of

FULL = ("full_attention", "global")
"""Names of layers with full causal attention in configurations."""


def segment_mask(segments: Segments, window: int | None = None, blocks: Tensor | None = None) -> Tensor:
    """Boolean mask `[B,1,T,T]`, True where a query (row) attends to a key. `window`: sliding window, None for full attention.

    `blocks [B,T]` numbers the blocks within which attention is bidirectional; −1 outside of them.
    """
    sequence, branch, offset = segments.sequence, segments.branch, segments.offset
    same = sequence[:, :, None] == sequence[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    mask = (same & visible).tril()
    if blocks is not None:
        mask = mask | (same & (blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None])
    if window is not None:
        mask = mask & (offset[:, :, None] - offset[:, None, :] < window)
    return mask[:, None]


def _sdpa(segments: Segments, window: int | None, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    return segment_mask(segments, window, blocks)


def _eager(segments: Segments, window: int | None, blocks: Tensor | None, dtype: torch.dtype) -> Tensor:
    mask = segment_mask(segments, window, blocks)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _flex(segments: Segments, window: int | None, blocks: Tensor | None, dtype: torch.dtype) -> BlockMask:
    sequence, branch, offset = segments.sequence, segments.branch, segments.offset

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (branch[b, j] == 0) | (branch[b, j] == branch[b, i])
        return (j <= i) & (sequence[b, i] == sequence[b, j]) & own

    def in_block(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (sequence[b, i] == sequence[b, j]) & (blocks[b, i] == blocks[b, j]) & (blocks[b, i] >= 0)

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return offset[b, i] - offset[b, j] < window

    function = sees if blocks is None else or_masks(sees, in_block)
    function = function if window is None else and_masks(function, near)
    if blocks is None:
        return block_mask(segments, window, function)
    rows, length = sequence.shape
    return create_block_mask(function, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=sequence.device)


SEGMENT_ATTENTION: dict[str, Callable] = {"sdpa": _sdpa, "varlen": _sdpa, "eager": _eager, "flex_attention": _flex}
"""Attention implementation → function `(segments, window, blocks, dtype) -> attention_mask`."""


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kinds of layers by their names in the configuration, with the sliding window of each (None: full attention).

    Kinds with other than full or sliding attention are left out: see `other_layers`.
    """
    text = vars(config.get_text_config())
    window = text.get("sliding_window")
    kinds = _kinds(text)
    if kinds:
        known = {kind: None if kind in FULL else window for kind in (*FULL, "sliding_attention")}
        return {kind: known[kind] for kind in kinds if kind in known}
    return {"sliding_attention": window} if window and text.get("use_sliding_window", True) else {FULL[0]: None}


def other_layers(config: PreTrainedConfig) -> list[str]:
    """Names of the kinds of layers whose attention is neither full nor sliding (linear attention, state space, …)."""
    return sorted(set(_kinds(config.get_text_config().to_dict())) - {*FULL, "sliding_attention"})


def _kinds(text: dict[str, Any]) -> list[str]:
    return sorted(set(text.get("layer_types") or text.get("attention_layers") or ()))


def layer_masks(
    config: PreTrainedConfig, segments: Segments, dtype: torch.dtype, inputs: Mapping[str, Tensor] | None = None
) -> Any:
    """The attention mask of the shared layout in the form that the model takes: one mask, or a dict by kind of layer.

    `inputs` are those of the forward pass; in some vision-language models they tell which tokens form bidirectional blocks.
    """
    make, blocks = SEGMENT_ATTENTION[attention_of(config)], _blocks(config, segments, inputs or {})
    within = family_of(config).in_layers if blocks is not None else ()
    masks = {
        kind: make(segments, window, blocks if kind in within else None, dtype)
        for kind, window in layer_windows(config).items()
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation of the language model."""
    return config.get_text_config()._attn_implementation


def _blocks(config: PreTrainedConfig, segments: Segments, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Numbers `[B,T]` of the blocks with bidirectional attention, −1 outside of them; None if the model has no such blocks."""
    family = family_of(config)
    if family is None or not family.look_ahead(config):
        return None
    types = next((inputs[n] for n, join in family.joins.items() if isinstance(join, PerToken) and n in inputs), None)
    if types is None:
        return None
    if family.sees_ahead == "prompt":
        return torch.where((types == 0) & (segments.branch == 0), segments.sequence.long(), -1)
    is_image = types == 1
    begins = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    return torch.where(is_image, begins.long().cumsum(1) - 1, -1)
