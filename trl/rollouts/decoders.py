"""What a decoder is: one step of many samples through a model, and who is in the batch. What decoders have in common.

Every kind takes new samples while others are under way, and gives the same logits. `SharedDecoder` (`shared_decoder.py`)
holds every prompt's keys once, `PagedDecoder` (`paged_decoder.py`) does so in pages on a GPU, and `RepeatedDecoder`
(`repeated_decoder.py`) repeats whatever cache the model makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from trl.data.inputs import batched
from trl.models.value_heads.heads import reading
from trl.rollouts.engine import Prompt
from trl.vision.encoder_outputs import with_encoder_outputs
from trl.vision.families import joins_of

PREFILL_TOKENS = 16_384
"""Tokens, with padding, of one prefill at most."""

LIKE_LENGTH = 0.75
"""Prompts are prefilled together if the shortest has this fraction of the longest's tokens."""


@dataclass(slots=True, eq=False)
class Sample:
    """A completion under way: number `number` of prompt `index`, `limit` new tokens at most."""

    index: int
    number: int
    prompt: Prompt
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stream: int = 0
    """The key of its random numbers, where these are made on the device."""


class Decoder(Protocol):
    """Holds the rows of a batch. `reserved` are the tokens that they and their prompts may come to hold."""

    @property
    def reserved(self) -> int: ...

    def cost(self, sample: Sample, *, after: Sequence[Sample] = ()) -> int:
        """What the sample would add to `reserved` if it were admitted with those of `after`."""
        ...

    def admit(self, samples: Sequence[Sample]) -> None:
        """Add rows behind the present ones."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B,V] float32 (guided: [B,2,V]) after each row's last token: tokens [B], of a new row its prompt's last."""
        ...

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Drop the other rows. Row i from now on is the row that was at `result[i]`."""
        ...


@dataclass(frozen=True)
class Policy:
    """A model as the decoders see it: what is called, and the transformers model inside (the same without adapters)."""

    model: nn.Module
    inner: PreTrainedModel
    action_values: Callable[[Tensor], Tensor] | None = None
    """Gives `[B,V]` of the states `[B,H]` that the head reads, where samples are guided by values."""

    @property
    def device(self) -> torch.device:
        return self.inner.get_input_embeddings().weight.device

    @cached_property
    def arguments(self) -> frozenset[str]:
        """What the model's forward takes by name."""
        return frozenset(inspect.signature(self.inner.forward).parameters)

    @property
    def cache_name(self) -> str | None:
        """What the forward calls its cache: it depends on the architecture and on the release of `transformers`."""
        return next((name for name in ("cache", "past_key_values", "cache_params") if name in self.arguments), None)

    @property
    def recurrent(self) -> bool:
        """Whether the model is state-space throughout: its steps take no mask, and it has no positions."""
        return self.inner._is_stateful and "position_ids" not in self.arguments

    def forward(self, *, cache: Cache, **inputs: Any) -> Tensor:
        """Logits [B,V] float32 of the last position; with `action_values` [B,2,V], those behind the logits.

        Positions are left out for a model that counts them itself.
        """
        inputs |= {self.cache_name: cache, "logits_to_keep": 1, "use_cache": True, "return_dict": True}
        left_out = {"position_ids", "logits_to_keep"} - self.arguments
        inputs = {name: value for name, value in inputs.items() if name not in left_out}
        if self.action_values is None:
            return self.model(**inputs).logits[:, -1].float()
        with reading(self.inner.get_output_embeddings()) as states:
            logits = self.model(**inputs).logits[:, -1].float()
        return torch.stack([logits, self.action_values(states[0][:, -1]).to(logits)], 1)

    def beside(self, prompts: Sequence[Prompt], lengths: Sequence[int], *, left: bool = False) -> dict[str, Any]:
        """What the model reads beside the first `lengths` tokens of prompts that lie one in each row, padded as `pad` does."""
        inputs = batched([p.inputs for p in prompts], joins_of(self.inner.config), lengths, left=left)
        return with_encoder_outputs({name: value.to(self.device) for name, value in inputs.items()})

    def positions(self, prompts: Sequence[Prompt], lengths: Sequence[int], *, left: bool = False) -> Tensor:
        """Positions [B,T], or [3,B,T], of the first `lengths` tokens of prompts that lie one in each row."""
        width, axes = max(lengths), {np.asarray(p.positions).ndim for p in prompts if p.positions is not None}
        table = np.zeros((3, len(prompts), width) if 2 in axes else (len(prompts), width), dtype=np.int64)
        for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            start = width - n if left else 0
            own = np.arange(n) if prompt.positions is None else np.asarray(prompt.positions)[..., :n]
            table[..., row, start : start + n] = own
        return torch.from_numpy(table).to(self.device)


def pad(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B,T] filled up with 0, and the mask [B,T] of real ones."""
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [f + list(r) if left else list(r) + f for r, f in zip(rows, fill, strict=True)]
    mask = [f + [1] * len(r) if left else [1] * len(r) + f for r, f in zip(rows, fill, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def like_lengths(lengths: dict[int, int]) -> Iterator[list[int]]:
    """Keys in batches of like lengths, longest first, within `PREFILL_TOKENS`."""
    batch: list[int] = []
    for key in sorted(lengths, key=lengths.__getitem__, reverse=True):
        longest = lengths[batch[0]] if batch else 0
        if batch and (lengths[key] < LIKE_LENGTH * longest or (len(batch) + 1) * longest > PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def fill_holes(alive: Sequence[bool]) -> list[int]:
    """The rows to keep, the last ones put where others leave, so that few rows move."""
    count = sum(alive)
    last = iter([row for row in range(count, len(alive)) if alive[row]])
    return [row if alive[row] else next(last) for row in range(count)]


def decoder_start(inner: PreTrainedModel) -> int:
    """The token that an encoder-decoder's completions start from."""
    start = inner.generation_config.decoder_start_token_id
    return inner.generation_config.bos_token_id if start is None else start
