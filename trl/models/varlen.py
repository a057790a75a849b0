"""Attention over packed and shared rows by one variable-length kernel call, without masks.

Each sequence of a packed row is a run of queries with its own keys. So are a prompt and the completions that branch off
it: the queries of a completion attend to the gathered keys [prompt, own], causally aligned at the end, as flash attention
aligns them when there are more keys than queries. So no masked pair is computed, the linear layers still process a prompt
once, and the backward of the gather sums the gradients that all completions send to the prompt's keys.

A model that is switched to this implementation uses it for batches with `Spans`, and PyTorch's `sdpa` for others. The spans
are passed as a keyword of the model's forward down to its attention, so that activation checkpointing has them in backward.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trl.errors import ModelError
from trl.models.patching import configs_of
from trl.ops.launch import has_values
from trl.types import Spans

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

TAKES = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)
"""Parameters of the kernel's function in this release of torch: scale and window since 2.11, and since 2.12 `enable_gqa`, without
which heads could share keys before."""

VARLEN = "varlen"
"""Name under which this attention implementation is registered in `transformers`."""


OTHERS = {"s_aux": "sinks", "position_bias": "a position bias"}
"""Keywords of attention in `transformers` that change its result, and that the kernel does not have."""


def has_varlen(model: PreTrainedModel) -> bool:
    """Whether `model` can be switched to `varlen`: it needs PyTorch ≥ 2.11, a model on CUDA, and `sdpa` attention."""
    is_sdpa = model.config._attn_implementation in ("sdpa", VARLEN) and model._supports_attention_backend
    return "window_size" in TAKES and model.device.type == "cuda" and is_sdpa


def switch(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention implementation of every part of `model`; saved configurations do not contain it."""
    for config in configs_of(model):
        config._attn_implementation_internal = implementation


def attend_as(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Switch `model`, which reads the policy's batches, to `varlen` if the policy uses it and is of the same class.

    The class was checked when the policy's layout was chosen.
    """
    if policy.config._attn_implementation == VARLEN and type(model) is type(policy) and has_varlen(model):
        switch(model, VARLEN)


def no_mask(device: torch.device) -> Tensor:
    """A dummy mask `[1,1,1,1]`: models pass a 4D mask on unchanged, and so build none; attention reads the spans."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Spans | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[B,T,hg,D]` of queries `[B,hg,T,D]` to keys `[B,h,T,D]`, by the spans of the batch if it has any."""
    # An image encoder within the model may be given the spans of the text as well.
    if spans is None or not getattr(module, "is_causal", True):
        if query.shape[2] > 1 and attention_mask is not None and attention_mask.shape == (1, 1, 1, 1):
            raise ModelError(
                f"{type(module).__name__} did not get the keyword spans: its model does not pass keyword arguments of forward "
                "on to its attention. Set attn_implementation='eager'."
            )
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given, **kwargs)
    asked = {
        "soft-capping": softcap,
        "dropout": dropout or None,
        **{words: kwargs.get(n) for n, words in OTHERS.items()},
    }
    if found := [words for words, value in asked.items() if value is not None]:
        raise ModelError(
            f"{type(module).__name__} has {found[0]} in its attention, which variable-length attention does not support: set "
            "attn_implementation, for example to 'eager'."
        )
    rows, _, length, _ = query.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    if spans.keys is not None:
        flat[1:] = (x.index_select(0, spans.keys) for x in flat[1:])
    function = by_kernel if _has_kernel(query, value) else by_runs
    out = function(*flat, spans, scale=scaling, window=sliding_window)
    return out.view(rows, length, *out.shape[1:]), None


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    return "window_size" in TAKES and query.is_cuda and _half(query, value) is not None


def _half(query: Tensor, value: Tensor) -> torch.dtype | None:
    """The half precision in which attention is computed: that of autocast, or of `value`; None in full precision."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return value.dtype if value.dtype in (torch.bfloat16, torch.float16) else None


def by_kernel(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, scale: float | None, window: int | None
) -> Tensor:
    """Attention `[B·T,hg,D]` of queries `[B·T,hg,D]` to keys `[K,h,D]` (K keys, after the gather), by PyTorch's kernel."""
    half = _half(query, value) or value.dtype
    return varlen_attn(
        *(x.to(half) for x in (query, key, value)),
        spans.query_starts,
        spans.key_starts,
        spans.longest_query,
        spans.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **({"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in TAKES else {}),
    )


def by_runs(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, scale: float | None, window: int | None
) -> Tensor:
    """As `by_kernel`, one call per run, for dtypes and devices without the kernel. Synchronises with the device."""
    if not has_values(query):  # fake tensors: the start of runs is unknown
        return query.clone()
    parts = []
    queries, keys = spans.query_starts.tolist(), spans.key_starts.tolist()
    for q0, q1, k0, k1 in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        back = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=query.device)[:, None]
        back = back - torch.arange(k1 - k0, device=query.device)
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out = nn.functional.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=seen, scale=scale, enable_gqa=len(q) != len(k)
        )
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


AttentionInterface.register(VARLEN, attend)
AttentionMaskInterface.register(VARLEN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
