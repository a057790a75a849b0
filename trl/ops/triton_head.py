"""The statistics of `logprobs.py` on GPUs, in one pass over tiles of logits with an online logsumexp.

For each token, with z its logits over the part of the vocabulary processed so far, the running maximum m and these sums are kept:

    s = Σ e^(z−m)     t = Σ e^(z−m) (z−m)     c = Σ e^(2(z−m))     a = Σ z

When the maximum grows to m′, with δ = m − m′, s becomes s e^δ, t becomes e^δ (t + δ s), and c becomes c e^(2δ) (Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; t and c follow from the same substitution). At the end

    log p(token) = z_token − m − log s      entropy = log s − t/s      Σ_v log p_v / V = a/V − m − log s
    Σ_v z_v / V = a/V                       Σ p² = c/s²

The matrix product for a tile is PyTorch's, with float32 output. Backward recomputes each tile, turns it into the gradient of the
logits in one kernel, and multiplies that with the weights and the hidden states, accumulating both products in float32. The
outer loop runs over the vocabulary, the inner one over tokens, so that the gradient of a part of the weights is complete, and
rounded once, before the next part begins. Memory besides inputs and gradients: one tile.

Both products need the gradient of the logits in half precision. bfloat16 would round it to 8 bits, and that error, 2e-3, would
be the largest of the head's. float16 has 11 bits at the same speed; to fit its range, gradient, weights and hidden states are
scaled by powers of two, which is exact.

M tokens, H hidden size, V vocabulary; m and v a tile's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl.ops.launch import launch
from trl.ops.logits import DETACHED, STATISTICS, LogitTransform
from trl.ops.products import add_product, product

TILE_ELEMENTS = 2**25
"""Logits per tile. Smaller tiles need more launches (four per tile in backward), larger ones more memory."""

TILE_ROWS = 4096
"""Maximal number of tokens per tile."""

BLOCK = 4096
"""Logits that a program processes at once."""

LOWEST = tl.constexpr(-3.0e38)
"""Initial running maximum: finite, so that differences of maxima are not NaN."""

TOP, TOTAL, WEIGHTED, SQUARED, SUM, CHOSEN = range(6)
"""Rows of the running state `[6,M]`: m, s, t, c, a as at the top of the file, and z of the target token."""


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _transformed(raw, scale, softcap, inverse_temperature, CAPPED: tl.constexpr):
    """z of raw logits; tanh(x) = 2 σ(2x) − 1."""
    z = raw * scale
    if CAPPED:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z * inverse_temperature


@triton.jit(do_not_specialize=["tokens", "first"])
def _accumulate_kernel(
    logits,
    bias,
    target,
    state,
    tokens,
    first,
    columns,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the running state with a tile `[m,v]` of raw logits, whose first column is token `first`. One program per token."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * columns
    state += row
    top = tl.load(state)
    total = tl.load(state + tokens)
    weighted = tl.load(state + 2 * tokens)
    squared = tl.load(state + 3 * tokens)
    summed = tl.load(state + 4 * tokens)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        raw = tl.load(line + column, mask=inside, other=0.0)
        if HAS_BIAS:
            raw += tl.load(bias + first + column, mask=inside, other=0.0)
        z = _transformed(raw, scale, softcap, inverse_temperature, CAPPED)
        higher = tl.maximum(top, tl.max(tl.where(inside, z, LOWEST), axis=0))
        shift = top - higher
        decay = tl.exp(shift)
        distance = z - higher
        e = tl.where(inside, tl.exp(distance), 0.0)
        weighted = decay * (weighted + shift * total) + tl.sum(tl.where(e > 0.0, e * distance, 0.0), axis=0)
        total = decay * total + tl.sum(e, axis=0)
        squared = decay * decay * squared + tl.sum(e * e, axis=0)
        summed += tl.sum(tl.where(inside, z, 0.0), axis=0)
        top = higher
    tl.store(state, top)
    tl.store(state + tokens, total)
    tl.store(state + 2 * tokens, weighted)
    tl.store(state + 3 * tokens, squared)
    tl.store(state + 4 * tokens, summed)
    place = tl.load(target + row) - first
    if (place >= 0) & (place < columns):
        raw = tl.load(line + place)
        if HAS_BIAS:
            raw += tl.load(bias + first + place)
        tl.store(state + 5 * tokens, _transformed(raw, scale, softcap, inverse_temperature, CAPPED))


@triton.jit(do_not_specialize=["tokens", "first"])
def _gradient_kernel(
    logits,
    bias,
    target,
    factors,
    out,
    tokens,
    first,
    columns,
    scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """∂loss/∂(raw logits) of a tile `[m,v]` into `out`, which may be `logits`. `factors [6,M]`: see `_factors`."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    offset = row.to(tl.int64) * columns + column
    factors += row
    normalizer = tl.load(factors)
    chosen = tl.load(factors + tokens)
    every = tl.load(factors + 2 * tokens)
    raw = tl.load(logits + offset, mask=inside, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias + first + column, mask=inside, other=0.0)
    z = _transformed(raw, scale, softcap, inverse_temperature, CAPPED)
    logp = z - normalizer
    p = tl.exp(logp)
    both = chosen + tl.load(factors + 3 * tokens)
    d = tl.where(column + first == tl.load(target + row), chosen, 0.0) + every - both * p
    if ENTROPY:
        d -= tl.where(p > 0.0, p * (tl.load(factors + 4 * tokens) * logp + tl.load(factors + 5 * tokens)), 0.0)
    slope = scale * inverse_temperature
    if CAPPED:
        capped = z / (softcap * inverse_temperature)
        d *= (1.0 - capped * capped) * slope
    else:
        d *= slope
    tl.store(out + offset, d.to(out.dtype.element_ty), mask=inside)


# ── tiles ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Tiles:
    """Computes the logits of a head tile by tile, in one reused buffer."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, dtype: torch.dtype
    ) -> None:
        self.hidden, self.weight, self.dtype = hidden, weight.detach(), dtype
        self.bias = None if bias is None else bias.detach().to(dtype).float()
        self.tokens, self.vocabulary = len(hidden), len(weight)
        self.rows = max(1, -(-self.tokens // max(1, -(-self.tokens // TILE_ROWS))))  # tiles of one height
        self.columns = min(self.vocabulary, max(256, TILE_ELEMENTS // self.rows // 256 * 256))
        self.memory = torch.empty(self.rows * self.columns, dtype=torch.float32, device=hidden.device)
        softcap = 1.0 if transform.softcap is None else transform.softcap
        self.constants = (float(transform.scale), float(softcap), 1.0 / transform.temperature)
        self.flags = {"HAS_BIAS": bias is not None, "CAPPED": transform.softcap is not None}

    def columns_in_turn(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the vocabulary, each with its weights `[v,H]` cast to the dtype of the matrix product."""
        for first in range(0, self.vocabulary, self.columns):
            part = slice(first, min(first + self.columns, self.vocabulary))
            yield part, self.weight[part].to(self.dtype)

    def rows_in_turn(self) -> Iterator[slice]:
        for first in range(0, self.tokens, self.rows):
            yield slice(first, min(first + self.rows, self.tokens))

    def logits(self, rows: slice, weight: Tensor) -> Tensor:
        """Raw logits `[m,v]` float32 of the tokens `rows` for a part of the weights, without the bias."""
        count = rows.stop - rows.start
        out = self.memory[: count * len(weight)].view(count, len(weight))
        return product(self.hidden[rows], weight.T, out=out)

    def accumulate(self, rows: slice, part: slice, weight: Tensor, target: Tensor, state: Tensor) -> None:
        """Compute a tile and update the running state `[6,M]`."""
        logits = self.logits(rows, weight)
        tensors = logits, self.bias, target[rows], state[:, rows]
        launch(
            _accumulate_kernel, (len(logits),), *tensors, *self._numbers(part), **self.flags, BLOCK=BLOCK, num_warps=8
        )

    def gradient(
        self, rows: slice, part: slice, weight: Tensor, target: Tensor, factors: Tensor, *, entropy: bool
    ) -> Tensor:
        """The gradient `[m,v]` of the loss with respect to a tile of raw logits, given `factors [6,M]` of `_factors`."""
        logits = self.logits(rows, weight)
        out = self.gradients[: logits.numel()].view_as(logits)
        grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
        tensors = logits, self.bias, target[rows], factors[:, rows], out
        launch(
            _gradient_kernel,
            grid,
            *tensors,
            *self._numbers(part),
            **self.flags,
            ENTROPY=entropy,
            BLOCK=BLOCK,
            num_warps=8,
        )
        return out

    @cached_property
    def gradients(self) -> Tensor:
        """Buffer for the gradient of a tile, in its own dtype; the buffer of the logits if that is float32, too."""
        dtype = _rounding(self.dtype)
        return self.memory if dtype == torch.float32 else torch.empty_like(self.memory, dtype=dtype)

    def _numbers(self, part: slice) -> tuple[int | float, ...]:
        """The numeric arguments of kernels for a tile, which follow the tensors."""
        return self.tokens, part.start, part.stop - part.start, *self.constants


def _statistics(state: Tensor, vocabulary: int, want: frozenset[str]) -> dict[str, Tensor]:
    """Statistics `[M]` by name, from the running state after the last tile (formulas at the top of the file)."""
    log_total = state[TOTAL].log()
    normalizer = state[TOP] + log_total
    result = {"logprobs": (state[CHOSEN] - state[TOP]) - log_total}
    if "entropy" in want:
        result["entropy"] = log_total - state[WEIGHTED] / state[TOTAL]
    if "mean_logprob" in want:
        result["mean_logprob"] = state[SUM] / vocabulary - normalizer
    if "mean_logit" in want:
        result["mean_logit"] = state[SUM] / vocabulary
    if "collision" in want:
        result["collision"] = state[SQUARED] / state[TOTAL].square()
    if "greedy" in want:
        result["greedy"] = (state[CHOSEN] >= state[TOP]).float()
    return result


def _factors(
    normalizer: Tensor,
    vocabulary: int,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_mean: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """What the gradient kernel needs per token, `[6,M]`: logsumexp, and with g the incoming gradients: g of the log-probability,
    g/V and g of the mean, g and g · entropy of the entropy."""
    factors = normalizer.new_zeros(6, len(normalizer))
    factors[0] = normalizer
    if d_logprobs is not None:
        factors[1] = d_logprobs
    if d_mean is not None:
        factors[2], factors[3] = d_mean / vocabulary, d_mean
    if d_entropy is not None:
        factors[4], factors[5] = d_entropy, d_entropy * entropy
    return factors


def _rounding(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the gradient of logits, if hidden states and weights are of `dtype`."""
    return torch.float16 if dtype == torch.bfloat16 else dtype


def _scales(largest: Tensor) -> Tensor:
    """Powers of two `[K]` that scale numbers up to `largest [K]` to at most 2¹⁴, within float16's range. Does not synchronise."""
    return torch.exp2((14.0 - torch.frexp(largest).exponent).clamp(max=60.0))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """`x` times `scale` in float16; `x` itself if `scale` is None."""
    return x if scale is None else torch.mul(x, scale, out=torch.empty_like(x, dtype=torch.float16))


class TritonLogprobs(torch.autograd.Function):
    """As `logprobs._LinearLogprobs`, for tensors on a GPU in float32, bfloat16 or float16."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, want, transform, dtype):
        ctx.set_materialize_grads(False)
        ctx.transform, ctx.dtype = transform, dtype
        state = torch.zeros(6, len(target), dtype=torch.float32, device=hidden.device)
        state[TOP] = LOWEST.value
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, target = hidden.detach().to(dtype), target.contiguous()
            tiles = _Tiles(hidden, weight, bias, transform, dtype)
            for part, vectors in tiles.columns_in_turn():
                for rows in tiles.rows_in_turn():
                    tiles.accumulate(rows, part, vectors, target, state)
        results = _statistics(state, len(weight), want)
        normalizer = state[TOP] + state[TOTAL].log()
        ctx.save_for_backward(hidden, weight, bias, target, normalizer, results.get("entropy"))
        ctx.mark_non_differentiable(*(results[name] for name in DETACHED if name in results))
        return tuple(results.get(name) for name in STATISTICS)

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy, d_mean, *_):
        hidden, weight, bias, target, normalizer, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        factors = _factors(normalizer, len(weight), d_logprobs, d_entropy, d_mean, entropy)
        of_logits = of_weight = of_hidden = None
        if len(hidden) and _rounding(ctx.dtype) != ctx.dtype:
            largest = 2 * factors[1:].abs().sum(0).amax() * abs(ctx.transform.scale / ctx.transform.temperature)
            norms = (torch.linalg.vector_norm(x, torch.inf).float() for x in (weight, hidden))
            of_logits, of_weight, of_hidden = _scales(torch.stack([largest, *norms]))
            factors[1:] *= of_logits
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, ctx.transform, ctx.dtype)
            states = _scaled(hidden, of_hidden)
            for part, vectors in tiles.columns_in_turn():
                total = d_weight[part].float() if needs_weight else None  # a view of d_weight if that is float32
                scaled = _scaled(vectors, of_weight)
                for rows in tiles.rows_in_turn():
                    d = tiles.gradient(rows, part, vectors, target, factors, entropy=d_entropy is not None)
                    if needs_hidden:
                        add_product(d_hidden[rows], d, scaled)
                    if needs_weight:
                        add_product(total, d.T, states[rows])
                    if needs_bias:
                        d_bias[part] += d.sum(0, dtype=torch.float32)
                if needs_weight and total.dtype != d_weight.dtype:
                    d_weight[part] = total if of_logits is None else total / (of_logits * of_hidden)
            if of_logits is not None:
                if needs_hidden:
                    d_hidden /= of_logits * of_weight
                if needs_weight and d_weight.dtype == torch.float32:
                    d_weight /= of_logits * of_hidden
                if needs_bias:
                    d_bias /= of_logits
        return d_hidden, d_weight, d_bias, None, None, None, None
