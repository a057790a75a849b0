"""KV caches that compute the attention of a decode step themselves, so that the keys need not be copied for the model."""

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
    """One layer of an `AttendingCache`: the methods that `transformers` calls. No attention mask is built from the answers."""

    is_sliding = False

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Never called: `AttendingCache.update` writes keys and values."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
    """The name of `get_max_length` in earlier releases of `transformers`."""


class AttendingCache(Cache):
    """A `transformers` cache that replaces the model's attention within `decoding(configs)`, for one token per row `[B,1]`."""

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
        """Store new keys and values `[B,h,T,D]` of the current layer, and return those that the model attends to."""

    @abstractmethod
    def _attend(self, query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
        """Attention output `[B,hg,D]` of the current layer for queries `[B,hg,D]`, each over all keys of its row.

        `key` and `value` are what `update` returned.
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
        """Attention function in the signature of `transformers`: queries `[B,hg,1,D]` to outputs `[B,1,hg,D]`.

        `s_aux [hg]` are the logits of attention sinks. If the module passes other keys or values than `update` returned
        (latent attention expands them first), the output is NaN, so that a comparison with a plain forward fails.
        """
        if key is not self.handed_out[0] or value is not self.handed_out[1]:
            return value.new_full((query.shape[0], 1, query.shape[1], value.shape[-1]), torch.nan), None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        form = Form(scale, softcap, self.current.window, s_aux)
        return self._attend(query[:, :, 0], key, value, form)[:, None], None

    @contextmanager
    def decoding(self, configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
        """Within it, models with these configs use this cache's attention.

        It is registered under a name of its own, for which `transformers` builds no attention mask.
        """
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
