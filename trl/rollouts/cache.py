"""A KV cache for a batch of samples that holds each prompt once.

A row (one sample) attends to the keys K_p of its prompt, stored once for all samples of the prompt, and to its own keys
K_o, those from the prompt's last token on. The two softmaxes are computed separately and merged by their normalisers:

    o_p, ℓ_p = softmax(q K_pᵀ) V_p, logsumexp(q K_pᵀ)       o_o, ℓ_o likewise
    o = o_o + σ(ℓ_p − ℓ_o) · (o_p − o_o)

which is the softmax over both (Juravsky et al. 2024, "Hydragen", equation 5). The M rows of a prompt form one block of
queries, so that K_p is read once per step, not once per row. Keys are written in place into buffers that grow by blocks;
when a row leaves, the last row takes its place.

Shapes: B rows, P prompts, M most rows of one prompt, S tokens of the longest prompt, L own tokens, h key heads, g query
heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl.rollouts.attending import AttendingCache, AttendingLayer
from trl.rollouts.decode_attention import Form

BLOCK = 64
"""The buffers of rows grow by this many tokens."""


@dataclass(slots=True)
class Plan:
    """Which keys each row attends to in the next decode step.

    members       [P,M] rows of each prompt, padded with row 0
    place         [B] index of each row in the flattened `members`, P·M
    prefix        [P] prompt tokens in the cache; `longest_prefix` is their maximum S
    written       [B] own tokens in the cache before this step; `longest` is their maximum
    shift         [P] what is added to the index of a token to get its position id; 0 where these are 0, 1, 2, …
    level         whether `written` is the same for all rows
    full_prompts  whether `prefix` is the same for all prompts
    """

    members: Tensor
    place: Tensor
    prefix: Tensor
    written: Tensor
    shift: Tensor
    longest_prefix: int
    longest: int
    level: bool
    full_prompts: bool

    @property
    def rows(self) -> int:
        return len(self.place)

    @property
    def number(self) -> Tensor:
        """Index [B], in prompt and completion, of the token that each row is fed in this step."""
        return self.prefix[self.place // self.members.shape[1]] + self.written

    @property
    def position(self) -> Tensor:
        """Position id [B] of that token."""
        return self.number + self.shift[self.place // self.members.shape[1]]

    def advance(self) -> None:
        self.written += 1
        self.longest += 1

    def own_bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Attention bias [B,1,1,L] over own keys, this step's included; None if every row sees all of them."""
        if self.level and (window is None or self.longest < window):
            return None
        back = self.written[:, None] - torch.arange(self.longest + 1, device=self.written.device)
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        return _bias(seen, dtype)[:, None, None]

    def prompt_bias(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Attention bias [P,1,M,1,S] over prompt keys; None if all are seen.

        M is 1 where all rows of a prompt see the same keys.
        """
        windowed = window is not None and self.longest_prefix + self.longest >= window
        if self.full_prompts and not windowed:
            return None
        key = torch.arange(self.longest_prefix, device=self.prefix.device)
        seen = (key < self.prefix[:, None])[:, None]
        if windowed:
            seen = seen & (self.number[self.members][:, :, None] - key < window)
        return _bias(seen, dtype)[:, None, :, None]


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else the lowest finite number: −∞ would give NaN in a row that sees no key."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _grown(buffer: Tensor | None, like: Tensor, rows: int, tokens: int) -> Tensor:
    """`buffer`, or where it is too small a copy of it grown to [≥rows, h, ≥tokens, D]; h, D and dtype are those of `like`."""
    if buffer is not None and buffer.shape[0] >= rows and buffer.shape[2] >= tokens:
        return buffer
    old = (0, 0) if buffer is None else (buffer.shape[0], buffer.shape[2])
    grown = like.new_zeros(max(rows, old[0]), like.shape[1], max(tokens, old[1]), like.shape[3])
    if buffer is not None:
        grown[: old[0], :, : old[1]] = buffer
    return grown


def _partial(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention output [·,h,Q,D] of queries [·,h,Q,D] over keys [·,h,K,D], and the logsumexp [·,h,Q,1] of its logits."""
    logits = torch.matmul(query * scale, key.transpose(-1, -2)).float()
    if softcap is not None:
        logits = (logits / softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits = logits.add_(bias)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights.to(value.dtype), value) / total.to(value.dtype), top + total.log()


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Add an attention sink, a key with logit `sink` and value 0, to an attention output and its logsumexp."""
    return out * torch.sigmoid(lse - sink).to(out.dtype), torch.logaddexp(lse, sink.expand_as(lse))


class SharedPromptLayer(AttendingLayer):
    """Keys and values of one layer: prompts [P,h,S,D] and rows [B,h,L,D]. `window` is its sliding window, or None."""

    prompt_keys: Tensor | None = None
    prompt_values: Tensor | None = None

    def write_prompts(self, key: Tensor, value: Tensor, slots: slice) -> None:
        """Store the prefilled keys and values [·,h,T,D] of the prompts in `slots`."""
        size = (slots.stop, key.shape[2])
        self.prompt_keys = _grown(self.prompt_keys, key, *size)
        self.prompt_values = _grown(self.prompt_values, value, *size)
        self.prompt_keys[slots, :, : key.shape[2]] = key
        self.prompt_values[slots, :, : key.shape[2]] = value

    def write_rows(self, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Append this step's keys and values [B,h,1,D] to each row's own, and return all of those [B,h,L,D]."""
        size = (plan.rows, -(-(plan.longest + 1) // BLOCK) * BLOCK)
        self.keys, self.values = _grown(self.keys, key, *size), _grown(self.values, value, *size)
        if plan.level:
            self.keys[: plan.rows, :, plan.longest] = key[:, :, 0]
            self.values[: plan.rows, :, plan.longest] = value[:, :, 0]
        else:
            rows = torch.arange(plan.rows, device=key.device)
            self.keys[rows, :, plan.written] = key[:, :, 0]
            self.values[rows, :, plan.written] = value[:, :, 0]
        return self.keys[: plan.rows, :, : plan.longest + 1], self.values[: plan.rows, :, : plan.longest + 1]

    def move_rows(self, target: Tensor, source: Tensor, tokens: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def move_prompt(self, target: int, source: int) -> None:
        if self.prompt_keys is not None:
            self.prompt_keys[target] = self.prompt_keys[source]
            self.prompt_values[target] = self.prompt_values[source]

    def reserve_prompts(self, prompts: int) -> None:
        """Grow the buffers to `prompts` slots: prompts of one token are not prefilled, but need a slot too."""
        if self.prompt_keys is not None:
            keys, values = self.prompt_keys, self.prompt_values
            self.prompt_keys = _grown(keys, keys, prompts, keys.shape[2])
            self.prompt_values = _grown(values, values, prompts, values.shape[2])


class SharedPromptCache(AttendingCache):
    """A KV cache with two modes: prefill (`plan` is None) fills the prompt `slots`; decode appends and attends by `plan`.

    In prefill the model runs its own attention on right-padded prompts; in decode this cache computes the attention, at
    position ids `plan.position`.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__([SharedPromptLayer(window) for window in windows])
        self.plan: Plan | None = None
        self.slots = slice(0, 0)
        self._biases: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}

    def prefill(self, slots: slice) -> None:
        """Prepare for a forward whose rows are the prompts of `slots`."""
        self.plan, self.slots = None, slots

    def decode(self, plan: Plan) -> None:
        """Prepare for a forward that is one decode step by `plan`."""
        self.plan = plan
        self._biases = {
            window: (plan.own_bias(window, torch.float32), plan.prompt_bias(window, torch.float32))
            for window in {layer.window for layer in self.layers}
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.plan is None else self.plan.longest_prefix + self.plan.longest

    def _write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.plan is not None:
            return self.current.write_rows(key, value, self.plan)
        self.current.write_prompts(key, value, self.slots)
        return key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
        """Attention over own keys `[B,h,L,D]`, given, and over the prompts' keys, read from the cache."""
        own_bias, prompt_bias = self._biases[form.window]
        rows, heads, size = query.shape
        query = query.reshape(rows, key.shape[1], -1, size)
        out, own = _partial(query, key, value, own_bias, form.scale, form.softcap)
        if form.sinks is not None:
            out, own = _with_sink(out, own, form.sinks.float().view(1, key.shape[1], -1, 1))
        if self.plan.longest_prefix:
            shared, prompt = self._attend_prompts(query, prompt_bias, form.scale, form.softcap)
            out = torch.lerp(out, shared, torch.sigmoid(prompt - own).to(out.dtype))
        return out.reshape(rows, heads, -1)

    def _attend_prompts(
        self, query: Tensor, bias: Tensor | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """Attention output [B,h,g,D] of queries [B,h,g,D] over their prompts' keys, and its logsumexp [B,h,g,1]."""
        plan, layer = self.plan, self.current
        (prompts, most), (heads, group, size) = plan.members.shape, query.shape[1:]
        query = query.index_select(0, plan.members.flatten()).view(prompts, most, heads, group, size)
        if bias is not None:
            bias = bias.expand(-1, -1, most if bias.shape[2] > 1 else 1, group if bias.shape[2] > 1 else 1, -1)
            bias = bias.reshape(prompts, 1, -1, bias.shape[-1])
        key = layer.prompt_keys[:prompts, :, : plan.longest_prefix]
        value = layer.prompt_values[:prompts, :, : plan.longest_prefix]
        parts = _partial(
            query.transpose(1, 2).reshape(prompts, heads, most * group, size), key, value, bias, scale, softcap
        )
        out, lse = (
            part.view(prompts, heads, most, group, -1).transpose(1, 2).reshape(prompts * most, heads, group, -1)
            for part in parts
        )
        return out.index_select(0, plan.place), lse.index_select(0, plan.place)
