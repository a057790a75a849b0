"""Attention of a decode step over a paged KV cache, where all rows of a prompt read the same prompt pages.

A row attends to the keys of its prompt, then to its own keys (from the prompt's last token on). Both are in one pool of
pages, and tables on the device say in which, so that shapes and addresses of a step stay the same while rows grow, leave
and enter. This file is the plain PyTorch version, which gathers a copy of every row's keys; the kernels of
`triton_decode.py` copy nothing.

B rows (padded to the bucket), h key heads, g query heads per key head, D head size, N pages of `page` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 8
"""Most rows in a tile, a group of rows of one prompt whose queries one kernel program handles together."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Which keys each row attends to. The tensors are on the device.

    pages   [B, prompt pages + own pages] int64: page table of each row; its own pages begin at column `prompt_pages`
    prefix  [B] int64: prompt tokens in the pool, 0 for padding rows
    own     [B] int64: own tokens in the pool before this step
    tiles   [B,TILE] int64: rows of one prompt each, padded with −1; tiles that are not needed are all −1
    span    keys of the longest row, this step's included, on the host; only `attend_by_gather` reads it
    """

    pages: Tensor
    prefix: Tensor
    own: Tensor
    tiles: Tensor
    prompt_pages: int
    span: int


@dataclass(frozen=True, slots=True)
class Form:
    """What an attention layer does to its logits: scale, soft-cap, sliding window, and the logits `[hg]` of its sinks."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


def own_places(tables: Tables, page: int) -> Tensor:
    """Token index `[B]` in the pool at which each row's new key is stored."""
    column = tables.prompt_pages + tables.own // page
    return tables.pages.gather(1, column[:, None])[:, 0] * page + tables.own % page


def write_by_index(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, tables: Tables) -> None:
    """Write the new keys and values `[B,h,D]` into the pools `[N,page,h,D]`."""
    places = own_places(tables, keys.shape[1])
    keys.flatten(0, 1).index_copy_(0, places, key)
    values.flatten(0, 1).index_copy_(0, places, value)


def attend_by_gather(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, form: Form) -> Tensor:
    """Attention output `[B,hg,D]` of queries `[B,hg,D]` over the pools `[N,page,h,D]`; gathers a copy of every row's keys."""
    (rows, _, size), (page, heads) = query.shape, keys.shape[1:3]
    prefix, position = tables.prefix[:, None], (tables.prefix + tables.own)[:, None]
    at = torch.arange(tables.span, device=query.device)
    column = torch.where(at < prefix, at // page, tables.prompt_pages + (at - prefix).clamp(min=0) // page)
    inside = torch.where(at < prefix, at % page, (at - prefix) % page)
    places = tables.pages.gather(1, column.clamp(max=tables.pages.shape[1] - 1)) * page + inside
    key, value = (pool.flatten(0, 1)[places] for pool in (keys, values))
    logits = torch.einsum("bhgd,bthd->bhgt", query.view(rows, heads, -1, size).float(), key.float()) * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    seen = at <= position if form.window is None else (at <= position) & (position - at < form.window)
    logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    if form.sinks is not None:
        sinks = form.sinks.float().view(1, heads, -1, 1).expand(rows, -1, -1, -1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., : tables.span]
    return torch.einsum("bhgt,bthd->bhgd", weights, value.float()).flatten(1, 2).to(query.dtype)
