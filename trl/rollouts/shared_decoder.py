"""A decoder with one KV cache per prompt (`cache.py`), for models with full or sliding-window attention in every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl.models.patching import configs_of
from trl.rollouts.cache import Plan, SharedPromptCache
from trl.rollouts.decoders import Decoder, Policy, Sample, batches_by_length, fill_holes, pad
from trl.rollouts.engine import Prompt
from trl.types import PerToken
from trl.vision.families import image_token_ids, joins_of


def attention_windows(inner: PreTrainedModel) -> list[int | None] | None:
    """The sliding window of each layer (None: full attention); None if any layer has another kind of attention."""
    config = inner.config.get_text_config(decoder=True)
    if inner.config.is_encoder_decoder or not inner._supports_attention_backend:
        return None
    layers = DynamicCache(config=config).layers
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunked or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]


class SharedDecoder:
    """A decoder whose rows share one KV cache per prompt.

    Prefill stops before the last token of the prompt: that token is the first that each row is fed in a decode step.
    """

    def __init__(self, policy: Policy, windows: Sequence[int | None], n: int) -> None:
        self.policy, self.n = policy, n
        self.cache = SharedPromptCache(windows)
        self.configs = configs_of(policy.inner)
        self.rows: list[Sample] = []
        self.prompts: dict[int, Prompt] = {}
        """Prompts by index, in the order of their slots in the cache."""
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
        for batch in batches_by_length({index: len(prompt) - 1 for index, prompt in new.items()}):
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
        extra = self.policy.prompt_inputs(prompts, lengths)
        self.policy.forward(input_ids=ids, position_ids=positions, cache=self.cache, **extra)

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


def last_token_is_text(policy: Policy, prompt: Prompt) -> bool:
    """True if the prompt's last token is plain text: no image token, and no per-token input other than 0.

    `SharedDecoder` feeds that token in a decode step, which passes token ids and positions alone.
    """
    if prompt.ids[-1] in image_token_ids(policy.inner.config):
        return False
    joins = joins_of(policy.inner.config)
    own = (v for name, v in prompt.inputs.items() if isinstance(joins.get(name), PerToken))
    return not any(values[len(prompt) - 1] for values in own)


def matches_plain_forward(policy: Policy, make: Callable[[list[Sample]], Decoder]) -> bool:
    """True if the decoder that `make` builds gives the logits of a plain forward, on two samples of five tokens.

    This trial, and not a list of architectures, finds models whose positions or attention differ from those of the decoder.
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
    exact = decoder.cache.layers[0].dtype == torch.float32  # the model's forward may run under autocast
    tolerance = 1e-3 if exact else 5e-2
    return bool((ours - plain).abs().max() <= tolerance * (1 + plain.abs().max()))
