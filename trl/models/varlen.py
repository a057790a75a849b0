"""Attention of packed and shared rows as one call of variable length, without masks.

Sequences of a packed row are runs of queries over their own keys. A prompt and the completions that branch off it are such
runs too: a branch's queries attend to gathered keys [prompt, own], causally aligned at the end, which is what flash
attention does where there are more keys than queries. So nothing is computed that a mask would hide, the linear layers
still see a prompt once, and the backward of the gather adds up what its branches ask of a prompt.

A model that is switched over attends this way where a batch has `Spans`, and as PyTorch's `sdpa` where it has none. The
spans travel as a keyword of the model's forward down to its attention, so that checkpointing finds them again in backward.
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
"""What the kernel's function takes in this release: before 2.11 no scale and no window, and it shares key heads unasked until
2.12, which wants to be told."""

VARLEN = "varlen"
"""The name of the attention implementation."""


def has_varlen(model: PreTrainedModel) -> bool:
    """Whether `model` may be switched over: PyTorch ≥ 2.11 has the kernel, the model is on CUDA and attends by `sdpa`."""
    is_sdpa = model.config._attn_implementation in ("sdpa", VARLEN) and model._supports_attention_backend
    return "window_size" in TAKES and model.device.type == "cuda" and is_sdpa


def switch(model: PreTrainedModel, implementation: str) -> None:
    """Let every part of `model` attend by `implementation`; configurations that are saved do not name it."""
    for config in configs_of(model):
        config._attn_implementation_internal = implementation


def attend_as(model: PreTrainedModel, policy: PreTrainedModel) -> None:
    """Let a model that reads the policy's batches attend as it does, where both are of one class: that one was tried."""
    if policy.config._attn_implementation == VARLEN and type(model) is type(policy) and has_varlen(model):
        switch(model, VARLEN)


def no_mask(device: torch.device) -> Tensor:
    """A mask of four dimensions, which models pass on as it is: none is made, and attention reads the spans."""
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
    if spans is None:
        if query.shape[2] > 1 and attention_mask is not None and attention_mask.shape == (1, 1, 1, 1):
            raise ModelError(f"{type(module).__name__} was not given the spans of its batch: its model drops keywords.")
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given, **kwargs)
    if softcap is not None or dropout:
        raise ModelError(
            f"{type(module).__name__} has a soft-cap or dropout in its attention: set attn_implementation."
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
    """The half precision that factors are rounded to: autocast's, or their own."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return value.dtype if value.dtype in (torch.bfloat16, torch.float16) else None


def by_kernel(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, scale: float | None, window: int | None
) -> Tensor:
    """Attention `[B·T,hg,D]` of queries `[B·T,hg,D]` to keys `[K,h,D]`, by one call of PyTorch's kernel."""
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
    """As `by_kernel`, run by run: for precisions and devices that the kernel does not have. Waits for the device."""
    if not has_values(query):  # nobody knows where runs begin
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
