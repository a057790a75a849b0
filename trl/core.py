"""Names that scripts import from `trl.core`: samplers, and small functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from trl.compat import names_for
from trl.models.reference import create_reference_model
from trl.ops import reduce
from trl.ops.reduce import masked_mean
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
"""Makes it a package, so that `from trl.core import NAME` says what to do without a name of another release."""


def logprobs_from_logits(logits: Tensor, labels: Tensor, gather: bool = True) -> Tensor:
    """log-softmax of logits `[…,V]` at `labels […]`; without `gather`, of the whole vocabulary."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) if gather else logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """−Σ_v p_v log p_v of logits `[…,V]`."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `values` where `mask` is 1, with Bessel's correction if `unbiased`."""
    squared = ((values - masked_mean(values, mask)).square() * mask).sum()
    return squared / (mask.sum() - int(unbiased)).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` with variance 1 over the mask, and with mean 0 if `shift_mean`; zero outside the mask."""
    return reduce.masked_whiten(values, mask, keep_mean=not shift_mean)


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` with variance 1, and with mean 0 if `shift_mean`."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """`x` within bounds that are tensors or numbers."""
    return torch.clamp(x, torch.as_tensor(tensor_min, device=x.device), torch.as_tensor(tensor_max, device=x.device))


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = flatten_dict(value, sep) if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}{sep}{name}": x for name, x in inner.items()}
    return flat


def stack_dicts(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Dicts of tensors as one dict of stacked flat tensors; shorter ones are padded with NaN."""
    stacked = {}
    for name in dicts[0]:
        rows = [entry[name].flatten().float() for entry in dicts]
        stacked[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
    return stacked
