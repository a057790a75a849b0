"""The protocol of decoders, which run decode steps for a batch of samples, and the parts that all decoders use.

Samples may enter and leave the batch between steps. All decoders give the same logits. `SharedDecoder` (`shared_decoder.py`)
keeps one KV cache per prompt, `PagedDecoder` (`paged_decoder.py`) keeps it in pages on a GPU, and `RepeatedDecoder`
(`repeated_decoder.py`) copies the model's own cache to every sample.
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
"""Most tokens of one prefill batch, padding included."""

LIKE_LENGTH = 0.75
"""A prompt joins a prefill batch if it has at least this fraction of the tokens of the batch's longest prompt."""


@dataclass(slots=True, eq=False)
class Sample:
    """An unfinished completion: sample `number` of prompt `index`, of at most `limit` new tokens."""

    index: int
    number: int
    prompt: Prompt
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stream: int = 0
    """Key of the sample's random numbers; set only where tokens are drawn without the host (`StaticSamplingLoop`)."""


class Decoder(Protocol):
    """Runs decode steps and holds the KV cache of the batch; a row is one unfinished sample.

    `reserved` counts the cache tokens set aside: those of the prompts, and of every row at its full length.
    """

    @property
    def reserved(self) -> int: ...

    def cost(self, sample: Sample, *, after: Sequence[Sample] = ()) -> int:
        """Tokens that admitting `sample` would add to `reserved`, if the samples `after` are admitted with it."""
        ...

    def admit(self, samples: Sequence[Sample]) -> None:
        """Add rows after the existing ones."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Feed each row its last token and return next-token logits [B,V] float32 (with value guidance [B,2,V]).

        `tokens` [B] holds the last sampled token of each row; for a new row, the last token of its prompt.
        """
        ...

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Drop the rows that are not `alive`. New row i is the former row `result[i]`."""
        ...


@dataclass(frozen=True)
class Policy:
    """A model as the decoders use it: `model` is called; `inner` is the transformers model in it, without PEFT wrapper."""

    model: nn.Module
    inner: PreTrainedModel
    action_values: Callable[[Tensor], Tensor] | None = None
    """For value guidance: maps the hidden states `[B,H]` that the head reads to action values `[B,V]`."""

    @property
    def device(self) -> torch.device:
        return self.inner.get_input_embeddings().weight.device

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names of the arguments of the model's forward."""
        return frozenset(inspect.signature(self.inner.forward).parameters)

    @property
    def cache_name(self) -> str | None:
        """Name of the forward's cache argument, which depends on the architecture and the release of `transformers`."""
        return next((name for name in ("cache", "past_key_values", "cache_params") if name in self.arguments), None)

    @property
    def recurrent(self) -> bool:
        """True if all layers are state-space layers: decode steps then take no attention mask and no positions."""
        return self.inner._is_stateful and "position_ids" not in self.arguments

    def forward(self, *, cache: Cache, **inputs: Any) -> Tensor:
        """Logits [B,V] float32 of the last position; with `action_values`, logits and action values stacked as [B,2,V].

        `position_ids` and `logits_to_keep` are passed only to models that take them.
        """
        inputs |= {self.cache_name: cache, "logits_to_keep": 1, "use_cache": True, "return_dict": True}
        left_out = {"position_ids", "logits_to_keep"} - self.arguments
        inputs = {name: value for name, value in inputs.items() if name not in left_out}
        if self.action_values is None:
            return self.model(**inputs).logits[:, -1].float()
        with reading(self.inner.get_output_embeddings()) as states:
            logits = self.model(**inputs).logits[:, -1].float()
        return torch.stack([logits, self.action_values(states[0][:, -1]).to(logits)], 1)

    def prompt_inputs(self, prompts: Sequence[Prompt], lengths: Sequence[int], *, left: bool = False) -> dict[str, Any]:
        """Further model inputs (pixel values, …) of a batch of prompts, one per row, padded on the same side as by `pad`.

        Of the inputs with one value per token, those of the first `lengths[i]` tokens of prompt i are used.
        """
        inputs = batched([p.inputs for p in prompts], joins_of(self.inner.config), lengths, left=left)
        return with_encoder_outputs({name: value.to(self.device) for name, value in inputs.items()})

    def positions(self, prompts: Sequence[Prompt], lengths: Sequence[int], *, left: bool = False) -> Tensor:
        """Position ids [B,T] ([3,B,T] for M-RoPE) of the first `lengths[i]` tokens of each prompt i, one prompt per row."""
        width, axes = max(lengths), {np.asarray(p.positions).ndim for p in prompts if p.positions is not None}
        table = np.zeros((3, len(prompts), width) if 2 in axes else (len(prompts), width), dtype=np.int64)
        for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            start = width - n if left else 0
            own = np.arange(n) if prompt.positions is None else np.asarray(prompt.positions)[..., :n]
            table[..., row, start : start + n] = own
        return torch.from_numpy(table).to(self.device)


def pad(rows: Sequence[Sequence[int]], device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [B,T] padded with 0, and the attention mask [B,T]."""
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [f + list(r) if left else list(r) + f for r, f in zip(rows, fill, strict=True)]
    mask = [f + [1] * len(r) if left else [1] * len(r) + f for r, f in zip(rows, fill, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def batches_by_length(lengths: dict[int, int]) -> Iterator[list[int]]:
    """Keys of `lengths` in batches of similar length, longest first, each within `PREFILL_TOKENS` when padded."""
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
    """Old indices of the rows that stay, in new order: the last rows fill the places of those that leave, the rest stays."""
    count = sum(alive)
    last = iter([row for row in range(count, len(alive)) if alive[row]])
    return [row if alive[row] else next(last) for row in range(count)]


def decoder_start(inner: PreTrainedModel) -> int:
    """The first decoder token of an encoder-decoder: `decoder_start_token_id`, or the beginning-of-sequence token."""
    start = inner.generation_config.decoder_start_token_id
    return inner.generation_config.bos_token_id if start is None else start
