"""What runs on CUDA, on tensors of a CPU that have shapes and no data: for programs that count launches, bytes or memory.

Autograd needs a device that is there, so tensors say that they are on a CPU. Functions that CUDA alone has are replaced by
ones that make and keep tensors of the same shapes; what the library does by itself on CUDA is switched on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from trl.models import fused, kept_activations, layouts, varlen
from trl.ops import logprobs, triton_head
from trl.trainers import sampling_memory
from trl.trainers.base import BaseTrainer


class Norm(torch.autograd.Function):
    """PyTorch's fused norm: one launch forward, two backward, for gradients of the input and of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1))
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, _, _ = ctx.saved_tensors
        return grad.relu(), x.sum(tuple(range(x.dim() - 1)))


class Flash(torch.autograd.Function):
    """Attention of variable length: queries, keys, values, the result and a float32 for each query and head are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.relu()
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:2]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return query.relu(), key.relu(), value.relu()


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A product in half precision with a float32 result, for which a CPU has to widen its factors."""
    return torch.empty(len(a), b.shape[1]) if out is None else out


def has_varlen(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in ("sdpa", varlen.VARLEN) and model._supports_attention_backend


FUNCTIONS: tuple[tuple[Any, str, Any], ...] = (
    (logprobs, "_implementation", lambda device, dtype: triton_head.TritonLogprobs),
    (varlen, "has_varlen", has_varlen),
    (layouts, "has_varlen", has_varlen),
    (varlen, "_has_kernel", lambda query, value: varlen._half(query, value) is not None),
    (varlen, "varlen_attn", lambda query, key, value, *spans, **options: Flash.apply(query, key, value)),
    (fused, "_has_kernel", lambda query: True),
    (kept_activations, "_has_kernel", lambda gate: True),
    (F, "rms_norm", lambda x, shape, weight, epsilon: Norm.apply(x, weight)),
)
"""What layers call."""

OF_TRAINERS: tuple[tuple[Any, str, Any], ...] = (
    (triton_head, "product", product),
    (triton_head, "add_product", lambda total, a, b: None),
    (BaseTrainer, "_is_on_cuda", lambda self: True),
    (BaseTrainer, "_fuses", lambda self: not self.args.torch_compile),
    (BaseTrainer, "micro_batch_budget", lambda self: self.args.max_tokens_per_micro_batch),
    (sampling_memory, "rounds_weights", lambda args: args.bf16 or args.fp16),
)
"""What trainers decide by the device, and products of the head, which are counted elsewhere."""


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Trainers and their estimates of memory are as on CUDA, on tensors without data."""
    with ExitStack() as stack:
        for place, name, function in (*FUNCTIONS, *OF_TRAINERS):
            stack.enter_context(patch.object(place, name, function))
        yield
