"""Caches that attend themselves: in decoding, a layer's attention reads the cache where it lies instead of a copy of its keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from trl.rollouts.decode_attention import Form


class AttendingLayer(CacheLayerMixin):
    """What models ask a layer's cache in decoding; no mask is made from the answers."""

    is_sliding = False

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Never called: the cache writes."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
    """Its name in earlier releases of `transformers`."""


class AttendingCache(Cache):
    """A `transformers` cache that models attend through within `decoding(configs)`, one token `[B,1]` per row."""

    def __init__(self, layers: Sequence[AttendingLayer]) -> None:
        super().__init__(layers=[*layers])
        self.current = self.layers[0]
        self.handed_out: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.current = self.layers[layer_idx]
        if not self.current.is_initialized:
            self.current.lazy_initialization(key_states, value_states)
        self.handed_out = self._write(key_states, value_states)
        return self.handed_out

    @abstractmethod
    def _write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values `[B,h,T,D]` of the current layer; what the model attends to."""

    @abstractmethod
    def _attend(self, query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
        """Attention `[B,hg,D]` of queries `[B,hg,D]` of the current layer to all keys of each row.

        `key` and `value` are what `update` handed out.
        """

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
        """Attention `[B,1,hg,D]` of queries `[B,hg,1,D]`, as modules call it; `s_aux [hg]` are logits of attention sinks.

        All NaN where the module does not attend to what the cache handed out (latent attention expands it first), so
        that a comparison with a plain forward fails.
        """
        if key is not self.handed_out[0] or value is not self.handed_out[1]:
            return value.new_full((query.shape[0], 1, query.shape[1], value.shape[-1]), torch.nan), None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        form = Form(scale, softcap, self.current.window, s_aux)
        return self._attend(query[:, :, 0], key, value, form)[:, None], None

    @contextmanager
    def decoding(self, configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
        """Models of these configs attend through this cache, under a name for which no mask is made."""
        name, before = f"decoding_{id(self)}", [config._attn_implementation for config in configs]
        AttentionInterface.register(name, self.attend)
        for config in configs:
            config._attn_implementation_internal = name
        try:
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation_internal = implementation
            AttentionInterface._global_mapping.pop(name)
