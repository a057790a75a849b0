"""Attention of the shared layout: a token sees its prompt, and its own branch up to itself.

Position i sees position j iff   j ≤ i,   sequence[i] = sequence[j],   and   branch[j] ∈ {0, branch[i]},
and in a layer with a window W   offset[i] − offset[j] < W.

Branch 0 is the prompt. Padding is a sequence of its own. A model that has layers of several kinds is given a mask for each,
by the names that its configuration has for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig

from trl.types import Segments

FULL = ("full_attention", "global")
"""What configurations call layers that see everything before them."""


def segment_mask(segments: Segments, window: int | None = None) -> Tensor:
    """Boolean `[B,1,T,T]`: which position sees which, in layers with that window (None: full attention)."""
    sequence, branch, offset = segments.sequence, segments.branch, segments.offset
    same = sequence[:, :, None] == sequence[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    mask = (same & visible).tril()
    if window is not None:
        mask = mask & (offset[:, :, None] - offset[:, None, :] < window)
    return mask[:, None]


def _sdpa(segments: Segments, window: int | None, dtype: torch.dtype) -> Tensor:
    return segment_mask(segments, window)


def _eager(segments: Segments, window: int | None, dtype: torch.dtype) -> Tensor:
    mask = segment_mask(segments, window)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _flex(segments: Segments, window: int | None, dtype: torch.dtype):
    sequence, branch, offset = segments.sequence, segments.branch, segments.offset

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (branch[b, j] == 0) | (branch[b, j] == branch[b, i])
        return (j <= i) & (sequence[b, i] == sequence[b, j]) & own

    def sees_near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(b, h, i, j) & (offset[b, i] - offset[b, j] < window)

    rows, length = sequence.shape
    near = sees if window is None else sees_near
    return create_block_mask(near, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=sequence.device)


SEGMENT_ATTENTION: dict[str, Callable] = {"sdpa": _sdpa, "eager": _eager, "flex_attention": _flex}
"""`(segments, window, dtype) -> attention_mask`, by the model's attention implementation."""


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kinds of layers, as the configuration names them, and the window of each; None where all before is seen.

    Kinds that are neither full nor sliding attention are not among them: see `other_layers`.
    """
    text = config.get_text_config().to_dict()
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


def layer_masks(config: PreTrainedConfig, segments: Segments, dtype: torch.dtype) -> Any:
    """The attention mask of the shared layout as a model of this configuration takes it: one, or one by kind of layer."""
    make = SEGMENT_ATTENTION[config._attn_implementation]
    masks = {kind: make(segments, window, dtype) for kind, window in layer_windows(config).items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))
