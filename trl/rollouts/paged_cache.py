"""Keys and values of prompts and samples in pages of one pool, which never moves while rows enter, grow and leave.

A page holds the keys of `page` tokens of one layer's every head. A prompt has pages of its own, read by all its samples,
and so has a sample. Which pages a row reads stands in tables (`decode_attention.py`); who leaves gives its pages back.
The last page is nobody's: rows that fill up a batch, and positions that fill up a prefill, write there.
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
"""Tokens of a page."""


class Pages:
    """Numbers of pages that are free, given out one by one."""

    def __init__(self, count: int) -> None:
        self.count, self._free = count, list(range(count - 1, -1, -1))

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), "admitted more than fits"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(reversed(pages))


class PagedLayer(AttendingLayer):
    """One layer's pools `[N+1,page,h,D]`, made when the first keys come; `window` of a sliding layer.

    Both have the type of values. Under autocast, rotated keys and queries are float32, and rounded before they are
    multiplied, as attention in training rounds them.
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
        """Keep prefilled keys `[P,h,S,D]` at `places [P·S]` of the pool's tokens."""
        for pool, states in ((self.keys, key), (self.values, value)):
            pool.flatten(0, 1).index_copy_(0, places, states.transpose(1, 2).flatten(0, 1).to(pool.dtype))


class PagedCache(AttendingCache):
    """A cache with two modes. Prefill: the keys of padded prompts go to `places`. Decode: by `tables`.

    `kernels` says whether the new token's attention is that of Triton's kernels or of plain torch.
    """

    def __init__(self, windows: Sequence[int | None], pages: int, *, page: int, kernels: bool) -> None:
        super().__init__([PagedLayer(window, pages, page) for window in windows])
        self.page, self.kernels = page, kernels
        self.places: Tensor | None = None
        self.tables: Tables | None = None

    @cached_property
    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What writes new keys and what attends to all."""
        if not self.kernels:
            return write_by_index, attend_by_gather
        from trl.rollouts.triton_decode import attend_by_kernels, write_by_kernel

        return write_by_kernel, attend_by_kernels

    def prefill(self, places: Tensor) -> None:
        """The next forward's tokens `[P·S]` go there."""
        self.places, self.tables = places, None

    def decode(self, tables: Tables) -> None:
        """The next forward is one step of the rows of `tables`."""
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
        """To the pages that `tables` name."""
        layer = self.current
        return self.functions[1](query.to(layer.dtype), layer.keys, layer.values, self.tables, form)
