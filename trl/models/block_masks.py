"""Block masks of flex attention for rows in which completions share their prompt, found without a mask of all pairs.

A position sees two runs of positions: of its prompt, and of its own branch up to itself. How many positions of a block of
128 it sees is the overlap of that block with both:

    seen[i, J] = |prompt(i) ∩ J| + |branch(i) ∩ J|

So a block of queries skips the blocks of which none of them sees anything, and asks for pairs only in those that are seen in
part: `[B, T, T / 128]` numbers, where the mask itself has `[B, T, T]`. Flex attention: arXiv:2412.05496.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from trl.types import Segments

BLOCK = 128
"""Positions of a block, of queries and of keys."""


def block_mask(segments: Segments, window: int | None, sees: Callable[..., Tensor]) -> BlockMask:
    """What every block of queries sees of every block of keys, in layers with that window (None: full attention).

    `sees(b, h, i, j)` decides where a block is seen in part.
    """
    length = segments.sequence.shape[1]
    seen = F.pad(seen_of_blocks(segments, window), (0, 0, 0, -length % BLOCK)).unflatten(1, (-1, BLOCK))
    whole = seen.amin(2) == BLOCK
    part = (seen.amax(2) > 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def seen_of_blocks(segments: Segments, window: int | None) -> Tensor:
    """`[B,T,K]`: how many positions of each of K blocks a position sees."""
    length = segments.sequence.shape[1]
    first = torch.arange(0, length, BLOCK, device=segments.sequence.device)
    overlaps = (
        torch.minimum(end[..., None], first + BLOCK) - torch.maximum(begin[..., None], first)
        for begin, end in visible_runs(segments, window)
    )
    return sum(overlap.clamp(min=0) for overlap in overlaps)


def visible_runs(segments: Segments, window: int | None) -> list[tuple[Tensor, Tensor]]:
    """Where the two runs that a position sees begin and end, `[B,T]` each: of its prompt, and of its branch up to itself.

    The prompt's own positions see the prompt up to themselves, which is their branch.
    """
    here = torch.arange(segments.sequence.shape[1], device=segments.sequence.device).expand_as(segments.sequence)
    text = _start_of_run(here, segments.sequence)
    branch = _start_of_run(here, segments.sequence, segments.branch)
    in_branch = segments.branch > 0
    prompt_end = text + torch.where(in_branch, segments.offset - (here - branch), 0)
    if window is None:
        return [(text, prompt_end), (branch, here + 1)]
    # In the prompt, whose positions are counted from where the text begins.
    earliest = text + segments.offset - window + 1
    return [(torch.maximum(text, earliest), prompt_end), (torch.maximum(branch, here - window + 1), here + 1)]


def _start_of_run(here: Tensor, *values: Tensor) -> Tensor:
    """The position at which a run of equal values begins, for every position `[B,T]`."""
    changes = torch.zeros_like(here, dtype=torch.bool)
    for value in values:
        changes[:, 1:] |= value[:, 1:] != value[:, :-1]
    return torch.where(changes, here, 0).cummax(1).values


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys there are for each block of queries, and which, those first: `[B,1,Q]`, `[B,1,Q,K]` int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
