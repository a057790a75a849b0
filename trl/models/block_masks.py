"""Block masks of flex attention (arXiv:2412.05496) for the shared layout, computed without a dense `[B,T,T]` mask.

A query attends to two runs of keys: its prompt, and its own completion (branch) up to itself. The number of keys that query
i attends to in a block J of 128 keys is the overlap of that block with both runs:

    seen[i, J] = |prompt(i) ∩ J| + |branch(i) ∩ J|

From these `[B, T, T / 128]` numbers follows which key blocks a block of queries skips, which it reads without a mask, and for
which the mask of each pair has to be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from trl.types import Segments

BLOCK = 128
"""Positions in a block of queries or keys."""


def block_mask(segments: Segments, window: int | None, sees: Callable[..., Tensor]) -> BlockMask:
    """The block mask of the shared layout. `window` is the sliding window, None for full attention.

    `sees(b, h, i, j)` says whether query i attends to key j, for blocks that are visible in part.
    """
    length = segments.sequence.shape[1]
    seen = F.pad(seen_of_blocks(segments, window), (0, 0, 0, -length % BLOCK)).unflatten(1, (-1, BLOCK))
    whole = seen.amin(2) == BLOCK
    part = (seen.amax(2) > 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def seen_of_blocks(segments: Segments, window: int | None) -> Tensor:
    """Number of keys in each of K blocks that a query attends to, `[B,T,K]`."""
    length = segments.sequence.shape[1]
    first = torch.arange(0, length, BLOCK, device=segments.sequence.device)
    overlaps = (
        torch.minimum(end[..., None], first + BLOCK) - torch.maximum(begin[..., None], first)
        for begin, end in visible_runs(segments, window)
    )
    return sum(overlap.clamp(min=0) for overlap in overlaps)


def visible_runs(segments: Segments, window: int | None) -> list[tuple[Tensor, Tensor]]:
    """Begin and end, `[B,T]` each, of the two runs that a query attends to: its prompt, and its branch up to itself.

    For a query in the prompt the first run is empty: the second is the prompt up to itself.
    """
    here = torch.arange(segments.sequence.shape[1], device=segments.sequence.device).expand_as(segments.sequence)
    text = _start_of_run(here, segments.sequence)
    branch = _start_of_run(here, segments.sequence, segments.branch)
    in_branch = segments.branch > 0
    prompt_end = text + torch.where(in_branch, segments.offset - (here - branch), 0)
    if window is None:
        return [(text, prompt_end), (branch, here + 1)]
    # The first position within the window, if it lies in the prompt: offsets count from the start of the text.
    earliest = text + segments.offset - window + 1
    return [(torch.maximum(text, earliest), prompt_end), (torch.maximum(branch, here - window + 1), here + 1)]


def _start_of_run(here: Tensor, *values: Tensor) -> Tensor:
    """For every position, the index `[B,T]` at which its run of equal values begins."""
    changes = torch.zeros_like(here, dtype=torch.bool)
    for value in values:
        changes[:, 1:] |= value[:, 1:] != value[:, :-1]
    return torch.where(changes, here, 0).cummax(1).values


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per block of queries, the number of selected key blocks `[B,1,Q]`, and all key blocks with these first
    `[B,1,Q,K]`; int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
