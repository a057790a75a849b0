"""Log-probabilities of tokens from hidden states, without storing the `[M,V]` logits.

    z = softcap · tanh(scale · (W h + b) / softcap) / temperature        (both transforms optional)
    log p(token) = z_token − log Σ_v exp z_v

A row of logits is as large as the vocabulary and is needed twice: to normalise, and for its gradient
∂ log p(token) / ∂z = onehot(token) − p. So tokens go through the head in chunks. As long as the probabilities of all chunks fit
into `KEPT_ELEMENTS`, backward reuses them; for further chunks it recomputes the logits. On CUDA, the kernels of
`triton_head.py` do the same. In half precision, hidden states and weights are rounded, logits are float32 (`products.py`).

M scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trl.ops.logits import DETACHED, STATISTICS, LogitTransform
from trl.ops.products import add_product, operand, product, wide, wide_dtype
from trl.ops.shapes import shapes

CHUNK_ELEMENTS = {"cpu": 2**23}
CHUNK_ELEMENTS_ACCELERATOR = 2**26
KEPT_ELEMENTS = 2**26


@shapes(logits="M V", target="M")
def logprobs_from_logits(
    logits: Tensor, target: Tensor, *, want: frozenset[str] = frozenset(), transform: LogitTransform | None = None
) -> dict[str, Tensor]:
    """Statistics `[M]` float32 of logits `[M,V]`, with gradients by autograd: for models that transform their logits in another
    way than `LogitTransform`, and for chunks."""
    z = (transform or LogitTransform())(wide(logits))
    logp = torch.log_softmax(z, dim=-1)
    chosen = logp.gather(-1, target[:, None]).squeeze(-1)
    result = {"logprobs": chosen}
    if "entropy" in want:
        result["entropy"] = -torch.special.xlogy(p := logp.exp(), p).sum(-1)
    if "mean_logprob" in want:
        result["mean_logprob"] = logp.mean(-1)
    with torch.no_grad():
        if "mean_logit" in want:
            result["mean_logit"] = z.mean(-1)
        if "collision" in want:
            result["collision"] = (2 * logp).exp().sum(-1)
        if "greedy" in want:
            result["greedy"] = (chosen >= logp.amax(-1)).to(logp.dtype)
    return result


@shapes(hidden="M H", target="M")
def logprobs_from_module(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target: Tensor,
    *,
    vocabulary: int,
    want: frozenset[str] = frozenset(),
    transform: LogitTransform | None = None,
) -> dict[str, Tensor]:
    """As `logprobs_from_linear`, for any `head: [m,H] -> [m,V]` (with adapters or quantised weights).

    Backward recomputes each chunk, so that only one chunk of logits exists at a time.
    """
    want = frozenset(want)

    def statistics(hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
        return logprobs_from_logits(head(hidden), target, want=want, transform=transform)

    parts = [
        checkpoint(statistics, hidden[rows], target[rows], use_reentrant=False, preserve_rng_state=False)
        for rows in _chunks(len(target), vocabulary, hidden.device)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@shapes(hidden="M H", weight="V H", bias="V", target="M")
def logprobs_from_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    want: frozenset[str] = frozenset(),
    transform: LogitTransform | None = None,
) -> dict[str, Tensor]:
    """Log-probabilities of `target [M]` under a linear head, and further statistics of the distributions.

    hidden [M,H], weight [V,H], bias [V] or None. Returns `[M]` float32 tensors by name: "logprobs", and those named in `want`:
    "entropy" −Σ p log p, "mean_logprob" Σ_v log p_v / V (these three carry gradients), "mean_logit" Σ_v z_v / V,
    "collision" Σ p², "greedy" (1 where the target is a most likely token).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    results = _implementation(hidden.device, dtype).apply(
        hidden, weight, bias, target, frozenset(want), transform or LogitTransform(), dtype
    )
    return {name: value for name, value in zip(STATISTICS, results, strict=True) if value is not None}


def _implementation(device: torch.device, dtype: torch.dtype) -> type[torch.autograd.Function]:
    """The Triton implementation on CUDA, except for float64; else the one in plain PyTorch."""
    if device.type == "cuda" and dtype != torch.float64 and has_triton():
        from trl.ops.triton_head import TritonLogprobs

        return TritonLogprobs
    return _LinearLogprobs


@cache
def has_triton() -> bool:
    """Whether Triton is installed: it comes with torch's builds for CUDA, but not on every system."""
    return find_spec("triton") is not None


def _chunks(count: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows with at most `CHUNK_ELEMENTS` logits each. Yields one slice for empty input, so that outputs have
    a shape."""
    rows = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS_ACCELERATOR) // vocabulary)
    for start in range(0, max(count, 1), rows):
        yield slice(start, start + rows)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, want, transform, dtype):
        ctx.set_materialize_grads(False)
        ctx.transform, ctx.dtype = transform, dtype
        trains = any(ctx.needs_input_grad)
        budget = KEPT_ELEMENTS if trains and transform.softcap is None else 0
        parts, ctx.kept = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, head = operand(hidden, dtype), _head(weight, bias, dtype)
            for rows in _chunks(len(target), len(weight), hidden.device):
                statistics, p = _statistics(_logits(hidden[rows], *head, transform), target[rows], want)
                parts.append(statistics)
                budget -= p.numel()
                ctx.kept.append(p if budget >= 0 else None)
        results = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        ctx.save_for_backward(hidden, weight, bias, target, results.get("entropy"))
        ctx.mark_non_differentiable(*(results[name] for name in DETACHED if name in results))
        return tuple(results.get(name) for name in STATISTICS)

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy, d_mean, *_):
        hidden, weight, bias, target, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden, dtype=wide_dtype(hidden.dtype)) if ctx.needs_input_grad[0] else None
        d_weight, d_bias = (
            torch.zeros_like(x, dtype=wide_dtype(x.dtype)) if needed else None
            for x, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            head = _head(weight, bias, ctx.dtype)
            chunks = _chunks(len(target), len(weight), hidden.device)
            for rows, p in zip(chunks, ctx.kept, strict=True):
                slope = ctx.transform.derivative
                if p is None:
                    z = _logits(hidden[rows], *head, ctx.transform)
                    p, factor = torch.softmax(z, dim=-1), slope(z)
                else:
                    factor = slope(p)
                d = _logit_gradient(
                    p,
                    target[rows],
                    *(g if g is None else g[rows] for g in (d_logprobs, d_entropy, d_mean)),
                    entropy=None if d_entropy is None else entropy[rows],
                )
                if not isinstance(factor, float) or factor != 1.0:
                    d.mul_(factor)
                if d_bias is not None:
                    d_bias += d.sum(0)
                d = d.to(hidden.dtype)
                if d_hidden is not None:
                    product(d, head[0], out=d_hidden[rows])
                if d_weight is not None:
                    add_product(d_weight, d.T, hidden[rows])
        return d_hidden, d_weight, d_bias, None, None, None, None  # autograd casts them to the dtypes of the inputs


def _head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return operand(weight, dtype), None if bias is None else wide(bias.detach().to(dtype))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """z `[m,V]` in float32 (or float64), as a new tensor that the caller may overwrite."""
    raw = product(hidden, weight.T)
    return transform(raw if bias is None else raw.add_(bias))


def _statistics(z: Tensor, target: Tensor, want: frozenset[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The statistics of a chunk, and its probabilities; overwrites `z`."""
    mean = z.mean(-1) if want & {"mean_logprob", "mean_logit"} else None
    top = z.amax(-1, keepdim=True)
    chosen = z.gather(-1, target[:, None]) - top
    z -= top
    e = z.exp() if "entropy" in want else z.exp_()
    total = e.sum(-1, keepdim=True)
    log_total = total.log()
    result = {"logprobs": (chosen - log_total).squeeze(-1)}
    p = e.div_(total)
    if "entropy" in want:
        result["entropy"] = log_total.squeeze(-1) - torch.linalg.vecdot(p, z)
    if "mean_logprob" in want:
        result["mean_logprob"] = mean - (top + log_total).squeeze(-1)
    if "mean_logit" in want:
        result["mean_logit"] = mean
    if "collision" in want:
        result["collision"] = torch.linalg.vecdot(p, p)
    if "greedy" in want:
        result["greedy"] = (chosen >= 0).squeeze(-1).to(z.dtype)
    return result, p


def _logit_gradient(
    p: Tensor,
    target: Tensor,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_mean: Tensor | None,
    *,
    entropy: Tensor | None,
) -> Tensor:
    """∂/∂z of the chunk: g (onehot − p) for log p, −g p (log p + H) for the entropy, g (1/V − p) for the mean."""
    zero = p.new_zeros(len(p))
    g = zero if d_logprobs is None else d_logprobs
    m = zero if d_mean is None else d_mean
    d = p * -(g + m)[:, None]
    if d_mean is not None:
        d += (m / p.shape[-1])[:, None]
    if d_entropy is not None:
        d -= d_entropy[:, None] * (torch.special.xlogy(p, p) + p * entropy[:, None])
    return d.scatter_add_(-1, target[:, None], g[:, None])
