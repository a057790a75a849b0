"""The names that existing scripts import from `trl.core`: samplers, and small tensor functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from trl.compat.names import names_for
from trl.models.reference import create_reference_model
from trl.ops import reduce
from trl.rollouts.respond import LengthSampler, respond_to_batch

__all__ = [
    "LengthSampler",
    "clip_by_value",
    "create_reference_model",
    "entropy_from_logits",
    "flatten_dict",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "whiten",
]

__getattr__ = names_for("trl.core")
__path__: list[str] = []
"""Makes this module a package, so that `from trl.core import NAME` raises an error with advice for a removed name."""


def logprobs_from_logits(logits: Tensor, labels: Tensor, gather: bool = True) -> Tensor:
    """Log-probabilities of `labels […]` under logits `[…,V]`; without `gather`, of the whole vocabulary, `[…,V]`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) if gather else logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy −Σ_v p_v log p_v, `[…]` in nats, of logits `[…,V]`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is 1, over all dimensions or along `axis`; 0 where the mask is empty."""
    return reduce.masked_mean(values, mask, axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `values` where `mask` is 1, with Bessel's correction if `unbiased`."""
    squared = ((values - masked_mean(values, mask)).square() * mask).sum()
    return squared / (mask.sum() - int(unbiased)).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale `values` to variance 1 over the mask, and to mean 0 if `shift_mean`; 0 outside the mask."""
    return reduce.masked_whiten(values, mask, keep_mean=not shift_mean)


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale `values` to variance 1, and to mean 0 if `shift_mean`."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """Clamp `x` to bounds that are tensors or numbers."""
    return torch.clamp(x, torch.as_tensor(tensor_min, device=x.device), torch.as_tensor(tensor_max, device=x.device))


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Flatten nested dicts, joining keys by `sep`: `{"a": {"b": 1}}` becomes `{"a/b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flatten_dict(value, sep) if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}{sep}{name}": x for name, x in inner.items()}
    return flat


def stack_dicts(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack dicts of tensors key by key: each tensor is flattened, and padded with NaN to the longest."""
    stacked = {}
    for name in dicts[0]:
        rows = [entry[name].flatten().float() for entry in dicts]
        stacked[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
    return stacked
