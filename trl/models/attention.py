"""Attention of the shared layout: a token sees its prompt, and its own branch up to itself.

Position i sees position j iff   j ≤ i,   tree[i] = tree[j],   and   branch[j] ∈ {0, branch[i]}.
Branch 0 is the prompt. Padding has a tree of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask


def segment_mask(tree: Tensor, branch: Tensor) -> Tensor:
    """Boolean `[B,1,T,T]` from tree and branch `[B,T]`."""
    same = tree[:, :, None] == tree[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return (same & visible).tril()[:, None]


def _sdpa(tree: Tensor, branch: Tensor, dtype: torch.dtype) -> Tensor:
    return segment_mask(tree, branch)


def _eager(tree: Tensor, branch: Tensor, dtype: torch.dtype) -> Tensor:
    mask = segment_mask(tree, branch)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _flex(tree: Tensor, branch: Tensor, dtype: torch.dtype):
    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (branch[b, j] == 0) | (branch[b, j] == branch[b, i])
        return (j <= i) & (tree[b, i] == tree[b, j]) & own

    rows, length = tree.shape
    return create_block_mask(sees, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=tree.device)


SEGMENT_ATTENTION: dict[str, Callable] = {"sdpa": _sdpa, "eager": _eager, "flex_attention": _flex}
"""`(tree, branch, dtype) -> attention_mask`, by the model's attention implementation."""
