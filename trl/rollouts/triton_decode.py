"""Triton kernels for the attention of `decode_attention.py`: the keys of a prompt are read once for a tile of its rows.

The keys of a row are split into parts. The softmax of each part is computed separately, and the parts are merged by their
normalisers ("flash decoding", Dao et al. 2023; for shared prompts "Hydragen", Juravsky et al. 2024, equation 5):

    o_i, ℓ_i = softmax(q K_iᵀ) V_i, logsumexp(q K_iᵀ)        o = Σ_i e^(ℓ_i − ℓ) o_i,   ℓ = logsumexp(ℓ_i)

Three kernels per layer: the first writes the new keys; the second computes the parts (a program takes the queries of a tile
of rows and some of their prompt's keys, or the queries of one row and some of its own keys); the third merges the parts.
Lengths are read from tables on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl.ops.launch import launch
from trl.rollouts.decode_attention import TILE, Form, Tables

PROMPT_PARTS = 8
"""Number of parts into which the keys of a prompt are split."""

PROGRAMS = 256
"""Least number of kernel programs to launch: with few rows, the own keys of a row are split into more parts."""


@triton.jit
def _write_kernel(keys, values, key, value, pages, own, columns, prompt_pages, key_stride, value_stride,
                  HEADS: tl.constexpr, SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, PAGE: tl.constexpr,
                  WIDTH: tl.constexpr):  # fmt: skip
    """Write the new keys and values `[B,h,D]` into the pools, one program per row and head."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    at = tl.load(own + row)
    page = tl.load(pages + row * columns + prompt_pages + at // PAGE)
    token = (page * PAGE + at % PAGE) * HEADS + head
    lane = tl.arange(0, WIDTH)
    tl.store(
        keys + token * SIZE + lane,
        tl.load(key + row * key_stride + head * SIZE + lane, mask=lane < SIZE),
        mask=lane < SIZE,
    )
    tl.store(
        values + token * VALUE_SIZE + lane,
        tl.load(value + row * value_stride + head * VALUE_SIZE + lane, mask=lane < VALUE_SIZE),
        mask=lane < VALUE_SIZE,
    )


@triton.jit
def _parts_kernel(query, keys, values, pages, prefix, own, tiles, out, normalizer,
                  rows_in_all, columns, prompt_pages, scale, softcap,
                  TILE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
                  SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
                  QUERIES: tl.constexpr, PAGE: tl.constexpr, PROMPT_PARTS: tl.constexpr, PARTS: tl.constexpr,
                  WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute one of `PARTS` parts of the attention: the first `PROMPT_PARTS` of a tile of rows over their prompt's keys, the
    others of a row over its own keys."""
    item = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    lane = tl.arange(0, QUERIES)
    of_prompt = part < PROMPT_PARTS
    members = tl.load(tiles + item * TILE + lane // GROUP, mask=lane < TILE * GROUP, other=-1)
    row = tl.where(of_prompt, members, tl.where(lane < GROUP, item, -1))
    leader = tl.where(of_prompt, tl.load(tiles + item * TILE), item)
    some_row = tl.maximum(leader, 0)
    before = tl.load(prefix + some_row)
    length = tl.where(of_prompt, tl.where(leader < 0, 0, before), tl.load(own + some_row) + 1)
    start = tl.where(of_prompt, 0, before)
    table = pages + some_row * columns + tl.where(of_prompt, 0, prompt_pages)
    split = part - tl.where(of_prompt, 0, PROMPT_PARTS)
    splits = tl.where(of_prompt, PROMPT_PARTS, PARTS - PROMPT_PARTS)
    valid = row >= 0
    position = tl.load(prefix + row, mask=valid, other=0) + tl.load(own + row, mask=valid, other=0)
    width = tl.arange(0, WIDTH)
    value_width = tl.arange(0, VALUE_WIDTH)
    place = row * HEADS * GROUP + head * GROUP + lane % GROUP
    q = tl.load(
        query + place[:, None] * SIZE + width[None, :], mask=valid[:, None] & (width[None, :] < SIZE), other=0.0
    )
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    pages_in_all = (length + PAGE - 1) // PAGE
    each = (pages_in_all + splits - 1) // splits
    last = tl.minimum((split + 1) * each, pages_in_all)
    for number in range(split * each, last):
        at = number * PAGE + tl.arange(0, PAGE)
        token = (tl.load(table + number) * PAGE + tl.arange(0, PAGE)) * HEADS + head
        k = tl.load(
            keys + token[:, None] * SIZE + width[None, :],
            mask=(at[:, None] < length) & (width[None, :] < SIZE),
            other=0.0,
        )
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
        seen = (at[None, :] < length) & valid[:, None]
        if WINDOW > 0:
            seen = seen & (position[:, None] - (start + at[None, :]) < WINDOW)
        logits = tl.where(seen, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        decay = tl.exp(top - base)
        weights = tl.exp(logits - base[:, None])
        v = tl.load(
            values + token[:, None] * VALUE_SIZE + value_width[None, :],
            mask=(at[:, None] < length) & (value_width[None, :] < VALUE_SIZE),
            other=0.0,
        )
        sums = sums * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * decay + tl.sum(weights, axis=1)
        top = higher
    target = part * rows_in_all * HEADS * GROUP + place
    some = total > 0.0
    safe = tl.where(some, total, 1.0)
    tl.store(
        out + target[:, None] * VALUE_SIZE + value_width[None, :],
        sums / safe[:, None],
        mask=valid[:, None] & (value_width[None, :] < VALUE_SIZE),
    )
    tl.store(normalizer + target, tl.where(some, top + tl.log(safe), -float("inf")), mask=valid)


@triton.jit
def _merge_kernel(parts, normalizer, sinks, prefix, out, rows_in_all,
                  ALL_HEADS: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr,
                  PARTS: tl.constexpr, PARTS_WIDTH: tl.constexpr, PROMPT_PARTS: tl.constexpr,
                  SINK: tl.constexpr):  # fmt: skip
    """Merge the parts of one head of a row. For a prompt without keys, the prompt's parts were not written."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.arange(0, PARTS_WIDTH)
    width = tl.arange(0, VALUE_WIDTH)
    prompt = tl.load(prefix + row) + part * 0
    written = (part < PARTS) & ((part >= PROMPT_PARTS) | (prompt > 0))
    place = (part * rows_in_all + row) * ALL_HEADS + head
    each = tl.load(normalizer + place, mask=written, other=-float("inf"))
    top = tl.max(each, axis=0)
    if SINK:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    weights = tl.exp(each - top)
    total = tl.sum(weights, axis=0)
    if SINK:
        total += tl.exp(sink - top)
    found = tl.load(
        parts + place[:, None] * VALUE_SIZE + width[None, :],
        mask=written[:, None] & (width[None, :] < VALUE_SIZE),
        other=0.0,
    )
    merged = tl.sum(found * weights[:, None], axis=0) / total
    tl.store(
        out + (row * ALL_HEADS + head) * VALUE_SIZE + width, merged.to(out.dtype.element_ty), mask=width < VALUE_SIZE
    )


def write_by_kernel(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, tables: Tables) -> None:
    """As `write_by_index`, by a kernel. `key` and `value` should be contiguous in their last two dimensions."""
    rows, heads, size = key.shape
    key, value = key.flatten(1), value.flatten(1)  # views if heads are contiguous, else copies
    launch(
        _write_kernel, (rows, heads),
        keys, values, key, value, tables.pages, tables.own,
        tables.pages.stride(0), tables.prompt_pages, key.stride(0), value.stride(0),
        HEADS=heads, SIZE=size, VALUE_SIZE=values.shape[-1], PAGE=keys.shape[1],
        WIDTH=triton.next_power_of_2(max(size, values.shape[-1])),
    )  # fmt: skip


def attend_by_kernels(query: Tensor, keys: Tensor, values: Tensor, tables: Tables, form: Form) -> Tensor:
    """As `attend_by_gather`, without copying keys; the keys of a prompt are read once for up to `TILE` rows."""
    (rows, all_heads, size), (page, heads), value_size = query.shape, keys.shape[1:3], values.shape[-1]
    query, group = query.contiguous(), all_heads // heads
    parts = PROMPT_PARTS + max(1, min(8, PROGRAMS // (rows * heads)))
    out = torch.empty(parts, rows, all_heads, value_size, dtype=torch.float32, device=query.device)
    normalizer = torch.empty(parts, rows, all_heads, dtype=torch.float32, device=query.device)
    width, value_width = (max(16, triton.next_power_of_2(x)) for x in (size, value_size))
    launch(
        _parts_kernel, (rows, heads, parts),
        query, keys, values, tables.pages, tables.prefix, tables.own, tables.tiles, out, normalizer,
        rows, tables.pages.stride(0), tables.prompt_pages, form.scale, form.softcap or 1.0,
        TILE=TILE, GROUP=group, HEADS=heads, SIZE=size, VALUE_SIZE=value_size,
        WIDTH=width, VALUE_WIDTH=value_width, QUERIES=max(16, triton.next_power_of_2(TILE * group)), PAGE=page,
        PROMPT_PARTS=PROMPT_PARTS, PARTS=parts, WINDOW=form.window or 0, CAPPED=form.softcap is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    merged = torch.empty(rows, all_heads, value_size, dtype=query.dtype, device=query.device)
    launch(
        _merge_kernel, (rows, all_heads),
        out, normalizer, merged if form.sinks is None else form.sinks, tables.prefix, merged, rows,
        ALL_HEADS=all_heads, VALUE_SIZE=value_size, VALUE_WIDTH=value_width, PARTS=parts,
        PARTS_WIDTH=triton.next_power_of_2(parts), PROMPT_PARTS=PROMPT_PARTS, SINK=form.sinks is not None,
    )  # fmt: skip
    return merged
