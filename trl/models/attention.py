"""Attention of the shared layout: a token sees its prompt, and its own branch up to itself.

Position i sees position j iff   j ≤ i,   sequence[i] = sequence[j],   and   branch[j] ∈ {0, branch[i]},
or both are of one block,
and in a layer with a window W   offset[i] − offset[j] < W.

Blocks are what models see ahead in: an image, or a whole prompt. Branch 0 is the prompt. Padding is a sequence of its own.
A model that has layers of several kinds is given a mask for each, by the names that its configuration has for them.
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
"""What configurations call layers that see everything before them."""


def segment_mask(segments: Segments, window: int | None = None, blocks: Tensor | None = None) -> Tensor:
    """Boolean `[B,1,T,T]`: which position sees which, in layers with that window (None: full attention).

    `blocks` `[B,T]` are numbers of blocks whose positions all see each other, −1 for those of none.
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
"""`(segments, window, blocks, dtype) -> attention_mask`, by the model's attention implementation."""


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kinds of layers, as the configuration names them, and the window of each; None where all before is seen.

    Kinds that are neither full nor sliding attention are not among them: see `other_layers`.
    """
    text = vars(config.get_text_config())
    window = text.get("sliding_window")
    kinds = _kinds(text)
    if kinds:
        known = {kind: None if kind in FULL else window for kind in (*FULL, "sliding_attention")}
        return {kind: known[kind] for kind in kinds if kind in known}
    return {"sliding_attention": window} if window and text.get("use_sliding_window", True) else {FULL[0]: None}


def other_layers(config: PreTrainedConfig) -> list[str]:
    """Kinds of layers, as the configuration names them, that are neither full nor sliding attention."""
    return sorted(set(_kinds(config.get_text_config().to_dict())) - {*FULL, "sliding_attention"})


def _kinds(text: dict[str, Any]) -> list[str]:
    return sorted(set(text.get("layer_types") or text.get("attention_layers") or ()))


def layer_masks(
    config: PreTrainedConfig, segments: Segments, dtype: torch.dtype, inputs: Mapping[str, Tensor] | None = None
) -> Any:
    """The attention mask of the shared layout as a model of this configuration takes it: one, or one by kind of layer.

    `inputs` are those of the forward pass, where blocks of tokens see each other that they tell.
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
    """`[B,T]` numbers of the blocks in which tokens see each other, −1 outside of them; None where there are none."""
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
