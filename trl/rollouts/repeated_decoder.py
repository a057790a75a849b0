"""A decoder for all models, recurrent ones and encoder-decoders included: it copies the model's own cache to every sample.

Each prompt is prefilled (or encoded) once, and its cache and encoder states are repeated for its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache

from trl.rollouts.decoders import Policy, Sample, decoder_start, pad
from trl.rollouts.engine import Prompt


@dataclass
class Cohort:
    """Rows that were admitted together and share a cache object.

    mask     [R,T] attention mask
    encoded  encoder hidden states, None for causal models
    logits   [R,V] ([R,2,V] with value guidance) of the prefill, until the first `step` returns them
    shift    [R] what is added to the index of a token to get its position id
    """

    rows: list[Sample]
    cache: Cache
    mask: Tensor
    encoded: Tensor | None
    logits: Tensor | None
    shift: Tensor | None = None

    def select(self, index: Tensor) -> None:
        """Reorder the rows: row i becomes the former row `index[i]`."""
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]
        self.encoded = None if self.encoded is None else self.encoded[index]
        self.logits = None if self.logits is None else self.logits[index]
        self.shift = None if self.shift is None else self.shift[index]


class RepeatedDecoder:
    """A decoder in which each row has its own copy of the prompt's cache. Each call of `admit` makes one cohort."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cohorts: list[Cohort] = []

    @property
    def reserved(self) -> int:
        return sum(self.cost(row) for cohort in self.cohorts for row in cohort.rows)

    def cost(self, sample: Sample, *, after: Sequence[Sample] = ()) -> int:
        return len(sample.prompt) + sample.limit

    def admit(self, samples: Sequence[Sample]) -> None:
        order = {index: number for number, index in enumerate(dict.fromkeys(s.index for s in samples))}
        prompts = {s.index: s.prompt for s in samples}
        start = self._encode if self.policy.inner.config.is_encoder_decoder else self._prefill
        cohort = start([prompts[index] for index in order])
        cohort.rows = list(samples)
        cohort.select(torch.tensor([order[s.index] for s in samples], device=self.policy.device))
        self.cohorts.append(cohort)

    def _prefill(self, prompts: list[Prompt]) -> Cohort:
        ids, mask = pad([prompt.ids for prompt in prompts], self.policy.device, left=True)
        cache, lengths = DynamicCache(config=self.policy.inner.config), [len(prompt) for prompt in prompts]
        inputs = self.policy.prompt_inputs(prompts, lengths, left=True)
        inputs["position_ids"] = self.policy.positions(prompts, lengths, left=True)
        logits = self.policy.forward(input_ids=ids, attention_mask=mask, cache=cache, **inputs)
        return Cohort([], cache, mask, None, logits, mask.new_tensor([prompt.shift for prompt in prompts]))

    def _encode(self, prompts: list[Prompt]) -> Cohort:
        ids, mask = pad([prompt.ids for prompt in prompts], self.policy.device)
        encoded = self.policy.inner.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)[0]
        config = self.policy.inner.config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        cohort = Cohort([], cache, mask, encoded, None)
        start = decoder_start(self.policy.inner)
        cohort.logits = self._decode(cohort, torch.full_like(ids[:, 0], start))
        return cohort

    def _decode(self, cohort: Cohort, tokens: Tensor) -> Tensor:
        return self.policy.forward(
            encoder_outputs=(cohort.encoded,),
            attention_mask=cohort.mask,
            decoder_input_ids=tokens[:, None],
            cache=cohort.cache,
        )

    def _continue(self, cohort: Cohort, tokens: Tensor) -> Tensor:
        cohort.mask = torch.cat([cohort.mask, torch.ones_like(cohort.mask[:, :1])], 1)
        return self.policy.forward(
            input_ids=tokens[:, None],
            attention_mask=None if self.policy.recurrent else cohort.mask,
            position_ids=cohort.mask.sum(-1, keepdim=True) - 1 + cohort.shift[:, None],
            cache=cohort.cache,
        )

    def step(self, tokens: Tensor) -> Tensor:
        parts = tokens.split([len(cohort.rows) for cohort in self.cohorts])
        return torch.cat([self._step(cohort, part) for cohort, part in zip(self.cohorts, parts, strict=True)])

    def _step(self, cohort: Cohort, tokens: Tensor) -> Tensor:
        if cohort.logits is not None:
            logits, cohort.logits = cohort.logits, None
            return logits
        return (self._continue if cohort.encoded is None else self._decode)(cohort, tokens)

    def keep(self, alive: Sequence[bool]) -> list[int]:
        kept, start = [], 0
        for cohort in self.cohorts:
            stay = [row for row in range(len(cohort.rows)) if alive[start + row]]
            kept += [start + row for row in stay]
            start += len(cohort.rows)
            if len(stay) < len(cohort.rows):
                cohort.rows = [cohort.rows[row] for row in stay]
                if stay:
                    cohort.select(torch.tensor(stay, device=self.policy.device))
        self.cohorts = [cohort for cohort in self.cohorts if cohort.rows]
        return kept
