"""Keys and values of prompts and samples in pages of one pool, which never moves while rows enter, grow and leave.

A page holds the keys of `page` tokens of one layer's every head. A prompt has pages of its own, read by all its samples,
and so has a sample. Which pages a row reads stands in tables (`decode_attention.py`); who leaves gives its pages back.
The last page is nobody's: rows that fill up a batch, and positions that fill up a prefill, write there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from trl.rollouts.cache import attending
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


class PagedLayer(CacheLayerMixin):
    """One layer's pools `[N+1,page,h,D]`, made when the first keys come; `window` of a sliding layer.

    Both have the type of values. Under autocast, rotated keys and queries are float32, and rounded before they are
    multiplied, as attention in training rounds them.
    """

    is_sliding = False

    def __init__(self, window: int | None, pages: int, page: int) -> None:
        super().__init__()
        self.window, self.pages, self.page = window, pages, page

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = value_states.dtype, key_states.device, True
        for name, like in (("keys", key_states), ("values", value_states)):
            shape = self.pages + 1, self.page, like.shape[1], like.shape[3]
            setattr(self, name, torch.zeros(shape, dtype=self.dtype, device=self.device))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def write(self, key: Tensor, value: Tensor, places: Tensor) -> None:
        """Keep prefilled keys `[P,h,S,D]` at `places [P·S]` of the pool's tokens."""
        for pool, states in ((self.keys, key), (self.values, value)):
            pool.flatten(0, 1).index_copy_(0, places, states.transpose(1, 2).flatten(0, 1).to(pool.dtype))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
    """Its name in earlier releases of `transformers`."""


class PagedCache(Cache):
    """A `transformers` cache with two modes. Prefill: the keys of padded prompts go to `places`. Decode: by `tables`.

    `kernels` says whether the new token's attention is that of Triton's kernels or of plain torch.
    """

    def __init__(self, windows: Sequence[int | None], pages: int, *, page: int, kernels: bool) -> None:
        super().__init__(layers=[PagedLayer(window, pages, page) for window in windows])
        self.page, self.kernels = page, kernels
        self.places: Tensor | None = None
        self.tables: Tables | None = None
        self.current = self.layers[0]
        self.handed_out: tuple[Tensor, Tensor] | None = None

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

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        layer = self.current = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if self.tables is None:
            layer.write(key_states, value_states, self.places)
        else:
            key, value = (states[:, :, 0] for states in (key_states, value_states))
            self.functions[0](layer.keys, layer.values, key.to(layer.dtype), value.to(layer.dtype), self.tables)
        self.handed_out = key_states, value_states
        return self.handed_out

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attention `[B,1,hg,D]` of queries `[B,hg,1,D]` to all keys of each row; `s_aux [hg]` are logits of sinks.

        All NaN where the module does not attend to what the cache handed out (latent attention expands it first), so
        that a comparison with a plain forward fails.
        """
        if key is not self.handed_out[0] or value is not self.handed_out[1]:
            return value.new_full((query.shape[0], 1, query.shape[1], value.shape[-1]), torch.nan), None
        layer, scale = self.current, query.shape[-1] ** -0.5 if scaling is None else scaling
        form = Form(scale, softcap, layer.window, s_aux)
        query = query[:, :, 0].to(layer.dtype)
        return self.functions[1](query, layer.keys, layer.values, self.tables, form)[:, None], None

    def decoding(self, configs: Sequence[PreTrainedConfig]) -> AbstractContextManager[None]:
        """Models of these configs attend through this cache. No mask function has its name, so none is made."""
        return attending(configs, self.attend)
