"""Attention of one new token per row to keys that lie in pages, prompts' keys held once for all rows of the prompt.

A row's keys are its prompt's, then its own. Both lie in one pool of pages; tables on the device say which, so that a
step stays the same, to the address, while rows grow, leave and enter. Here in plain torch, by a copy of every row's
keys; `triton_decode.py` has kernels that copy nothing.

B rows (with those that fill a bucket up), h key heads, g query heads per key head, D head size, N pages of `page` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 8
"""Rows of a prompt in a tile of `Tables`."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Which keys a row sees, all on the device.

    pages   [B, prompt pages + own pages] int64: where a row's keys lie; its own begin at column `prompt_pages`
    prefix  [B] int64: prompt tokens in the pool, 0 for rows that fill up
    own     [B] int64: own tokens in the pool before this step's
    tiles   [B,TILE] int64: rows of one prompt, −1 for none; the tiles behind the last are empty
    span    keys of the row with most, this step's included, on the host; only `attend_by_gather` reads it
    """

    pages: Tensor
    prefix: Tensor
    own: Tensor
    tiles: Tensor
    prompt_pages: int
    span: int


@dataclass(frozen=True, slots=True)
class Form:
    """What an attention layer does to its logits: scale, soft-cap, sliding window, and logits of sinks `[hg]`."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


def own_places(tables: Tables, page: int) -> Tensor:
    """Where `[B]` in the pool's tokens each row's new key goes."""
    column = tables.prompt_pages + tables.own // page
    return tables.pages.gather(1, column[:, None])[:, 0] * page + tables.own % page


def write_by_index(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, tables: Tables) -> None:
    """Write new keys and values `[B,h,D]` into the pools `[N,page,h,D]`."""
    places = own_places(tables, keys.shape[1])
    keys.flatten(0, 1).index_copy_(0, places, key)
    values.flatten(0, 1).index_copy_(0, places, value)


def attend_by_gather(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, form: Form) -> Tensor:
    """Attention `[B,hg,D]` of queries `[B,hg,D]` over pools `[N,page,h,D]`, by a copy of every row's keys."""
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
