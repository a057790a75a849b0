"""A paged KV cache: one pool per layer, whose memory stays at the same address while rows enter, grow and leave.

A page holds the keys of `page` tokens, for all heads of a layer. Each prompt has its own pages, which all its samples
read, and each sample has pages for its completion; they are freed when it ends. Page tables say which pages a row reads
(`decode_attention.py`). The last page belongs to nobody: padding rows and padding positions write there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trl.rollouts.attending import AttendingCache, AttendingLayer
from trl.rollouts.decode_attention import Form, Tables, attend_by_gather, write_by_index

PAGE = 64
"""Tokens per page."""


class Pages:
    """The free list of page numbers 0 … count − 1."""

    def __init__(self, count: int) -> None:
        self.count, self._free = count, list(range(count - 1, -1, -1))

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), "admitted more than fits"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(reversed(pages))


class PagedLayer(AttendingLayer):
    """The pools `[N+1,page,h,D]` of one layer for keys and for values, allocated at the first write.

    Both have the dtype of the values. Under autocast, keys and queries come out of the rotary embedding in float32; they
    are rounded to that dtype before they are multiplied, as attention in training rounds them.
    """

    def __init__(self, window: int | None, pages: int, page: int) -> None:
        super().__init__(window)
        self.pages, self.page = pages, page

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(value_states, value_states)
        for name, like in (("keys", key_states), ("values", value_states)):
            shape = self.pages + 1, self.page, like.shape[1], like.shape[3]
            setattr(self, name, torch.zeros(shape, dtype=self.dtype, device=self.device))

    def write(self, key: Tensor, value: Tensor, places: Tensor) -> None:
        """Store prefilled keys and values `[P,h,S,D]` at the token indices `places [P·S]` of the pools."""
        for pool, states in ((self.keys, key), (self.values, value)):
            pool.flatten(0, 1).index_copy_(0, places, states.transpose(1, 2).flatten(0, 1).to(pool.dtype))


class PagedCache(AttendingCache):
    """A paged KV cache with two modes: prefill writes padded prompts to `places`; decode reads and writes by `tables`.

    `kernels` chooses Triton kernels for the attention of a decode step; otherwise it runs in plain PyTorch.
    """

    def __init__(self, windows: Sequence[int | None], pages: int, *, page: int, kernels: bool) -> None:
        super().__init__([PagedLayer(window, pages, page) for window in windows])
        self.page, self.kernels = page, kernels
        self.places: Tensor | None = None
        self.tables: Tables | None = None

    @cached_property
    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The functions that write the new keys and that compute the attention of a decode step."""
        if not self.kernels:
            return write_by_index, attend_by_gather
        from trl.rollouts.triton_decode import attend_by_kernels, write_by_kernel

        return write_by_kernel, attend_by_kernels

    def prefill(self, places: Tensor) -> None:
        """Prepare for a forward whose tokens are stored at the token indices `places [P·S]` of the pools."""
        self.places, self.tables = places, None

    def decode(self, tables: Tables) -> None:
        """Prepare for a forward that is one decode step of the rows of `tables`."""
        self.places, self.tables = None, tables

    def _write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.current
        if self.tables is None:
            layer.write(key, value, self.places)
        else:
            new = (states[:, :, 0].to(layer.dtype) for states in (key, value))
            self.functions[0](layer.keys, layer.values, *new, self.tables)
        return key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
        """Attention over the pages that `tables` names; `key` and `value` are already in them."""
        layer = self.current
        return self.functions[1](query.to(layer.dtype), layer.keys, layer.values, self.tables, form)
