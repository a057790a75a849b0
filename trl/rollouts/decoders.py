"""One step of many samples through a causal or encoder-decoder model, and who is in the batch.

`SharedDecoder` holds every prompt's keys once (`cache.py`): full and sliding attention. `RepeatedDecoder` prefills (or
encodes) every prompt once and repeats whatever cache the model makes: recurrent layers, encoder-decoders. Both take
new samples while others are under way, and give the same logits.
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
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from trl.data.inputs import batched
from trl.models.patching import configs_of
from trl.models.value_heads.heads import reading
from trl.rollouts.cache import Plan, SharedPromptCache
from trl.rollouts.engine import Prompt
from trl.types import PerToken
from trl.vision.encoder_outputs import with_encoder_outputs
from trl.vision.families import image_token_ids, joins_of

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


# ── one copy of each prompt ─────────────────────────────────────────────────────────────────────────────────────


def attention_windows(inner: PreTrainedModel) -> list[int | None] | None:
    """The sliding window of every layer (None: full attention), or None where some layer is neither."""
    config = inner.config.get_text_config(decoder=True)
    if inner.config.is_encoder_decoder or not inner._supports_attention_backend:
        return None
    layers = DynamicCache(config=config).layers
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunked or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]


class SharedDecoder:
    """Rows that read one copy of their prompt's keys. All but a prompt's last token is prefilled; a row starts with it."""

    def __init__(self, policy: Policy, windows: Sequence[int | None], n: int) -> None:
        self.policy, self.n = policy, n
        self.cache = SharedPromptCache(windows)
        self.configs = configs_of(policy.inner)
        self.rows: list[Sample] = []
        self.prompts: dict[int, Prompt] = {}
        """In the order in which the cache holds them."""
        self.unfinished: dict[int, int] = {}
        self.plan: Plan | None = None

    @property
    def reserved(self) -> int:
        return sum(map(len, self.prompts.values())) + sum(row.limit for row in self.rows)

    def cost(self, sample: Sample, *, after: Sequence[Sample] = ()) -> int:
        held = sample.index in self.prompts or sample.index in {other.index for other in after}
        return sample.limit + (0 if held else len(sample.prompt))

    def admit(self, samples: Sequence[Sample]) -> None:
        new = {s.index: s.prompt for s in samples if s.index not in self.prompts}
        for batch in like_lengths({index: len(prompt) - 1 for index, prompt in new.items()}):
            self._prefill([new[index] for index in batch])
            self.prompts |= {index: new[index] for index in batch}
        for layer in self.cache.layers:
            layer.reserve_prompts(len(self.prompts))
        self.unfinished |= dict.fromkeys(new, self.n)
        self.rows += samples
        self._replan()

    def _prefill(self, prompts: list[Prompt]) -> None:
        self.cache.prefill(slice(len(self.prompts), len(self.prompts) + len(prompts)))
        lengths = [len(prompt) - 1 for prompt in prompts]
        if not lengths[0]:
            return
        ids, _ = pad([prompt.ids[:-1] for prompt in prompts], self.policy.device)
        if all(prompt.positions is None for prompt in prompts):
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        else:
            positions = self.policy.positions(prompts, lengths)
        beside = self.policy.beside(prompts, lengths)
        self.policy.forward(input_ids=ids, position_ids=positions, cache=self.cache, **beside)

    def step(self, tokens: Tensor) -> Tensor:
        self.cache.decode(self.plan)
        with self.cache.decoding(self.configs):
            logits = self.policy.forward(
                input_ids=tokens[:, None], position_ids=self.plan.position[:, None], cache=self.cache
            )
        self.plan.advance()
        return logits

    def keep(self, alive: Sequence[bool]) -> list[int]:
        for row, lives in zip(self.rows, alive, strict=True):
            self.unfinished[row.index] -= not lives
        kept = fill_holes(alive)
        moved = [target for target, source in enumerate(kept) if target != source]
        if moved:
            target, source = self._tensor(moved), self._tensor([kept[row] for row in moved])
            for layer in self.cache.layers:
                layer.move_rows(target, source, self.plan.longest)
        self.rows = [self.rows[source] for source in kept]
        self._retire_prompts()
        if self.rows:
            self._replan()
        return kept

    def _retire_prompts(self) -> None:
        slots = list(self.prompts)
        kept = fill_holes([self.unfinished[index] > 0 for index in slots])
        for target, source in enumerate(kept):
            if target != source:
                for layer in self.cache.layers:
                    layer.move_prompt(target, source)
        self.prompts = {index: self.prompts[index] for index in (slots[source] for source in kept)}

    def _tensor(self, numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, device=self.policy.device)

    def _replan(self) -> None:
        slot_of = {index: slot for slot, index in enumerate(self.prompts)}
        members: list[list[int]] = [[] for _ in self.prompts]
        spots = []
        for row, sample in enumerate(self.rows):
            slot = slot_of[sample.index]
            spots.append((slot, len(members[slot])))
            members[slot].append(row)
        most = max(map(len, members))
        prefix = [len(prompt) - 1 for prompt in self.prompts.values()]
        written = [len(row.ids) for row in self.rows]
        self.plan = Plan(
            members=self._tensor([rows + [0] * (most - len(rows)) for rows in members]),
            place=self._tensor([slot * most + spot for slot, spot in spots]),
            prefix=self._tensor(prefix),
            written=self._tensor(written),
            shift=self._tensor([prompt.shift for prompt in self.prompts.values()]),
            longest_prefix=max(prefix),
            longest=max(written),
            level=min(written) == max(written),
            full_prompts=min(prefix) == max(prefix),
        )


def ends_in_text(policy: Policy, prompt: Prompt) -> bool:
    """Whether nothing beside tokens is about the prompt's last one, which `SharedDecoder` reads without."""
    if prompt.ids[-1] in image_token_ids(policy.inner.config):
        return False
    joins = joins_of(policy.inner.config)
    own = (v for name, v in prompt.inputs.items() if isinstance(joins.get(name), PerToken))
    return not any(values[len(prompt) - 1] for values in own)


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


def proves_sharing(policy: Policy, make: Callable[[list[Sample]], Decoder]) -> bool:
    """Whether the decoder that `make` gives has the logits of a plain forward, on two samples of five tokens.

    Position schemes and attention variants are many; a model whose attention is not the one of `cache.py` shows here.
    """
    vocabulary = policy.inner.get_input_embeddings().weight.shape[0]
    *prompt, first, second = (token % vocabulary for token in (11, 7, 5, 3, 2, 13))
    rows = [Sample(0, number, Prompt(prompt), 4) for number in range(2)]
    decoder = make(rows)
    decoder.admit(rows)
    decoder.step(torch.tensor([prompt[-1]] * 2, device=policy.device))
    ours = decoder.step(torch.tensor([first, second], device=policy.device))
    whole = torch.tensor([[*prompt, first], [*prompt, second]], device=policy.device)
    plain = policy.model(input_ids=whole, use_cache=False, return_dict=True).logits[:, -1].float()
    exact = decoder.cache.layers[0].dtype == torch.float32  # autocast may stand inside the forward
    tolerance = 1e-3 if exact else 5e-2
    return bool((ours - plain).abs().max() <= tolerance * (1 + plain.abs().max()))


# ── the cache repeated ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Cohort:
    """Rows that were admitted together: their cache, mask [R,T], encoder states, logits [R,V] ([R,2,V]) not yet handed out, and
    what is added to a token's number to get its position, [R]."""

    rows: list[Sample]
    cache: Cache
    mask: Tensor
    encoded: Tensor | None
    logits: Tensor | None
    shift: Tensor | None = None

    def select(self, index: Tensor) -> None:
        """Row i becomes what row `index[i]` was."""
        self.cache.reorder_cache(index)
        self.mask = self.mask[index]
        self.encoded = None if self.encoded is None else self.encoded[index]
        self.logits = None if self.logits is None else self.logits[index]
        self.shift = None if self.shift is None else self.shift[index]


class RepeatedDecoder:
    """Rows with a copy each of their prompt's cache. Every wave of admissions is a cohort with a cache of its own."""

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
        inputs = self.policy.beside(prompts, lengths, left=True)
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


def decoder_start(inner: PreTrainedModel) -> int:
    """The token that an encoder-decoder's completions start from."""
    start = inner.generation_config.decoder_start_token_id
    return inner.generation_config.bos_token_id if start is None else start
