"""Draw the next token of every row of a batch, by `sampling.py`; rows may enter and leave between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from trl.rollouts.sampling import SamplingParams, ban, chosen_logprobs, draw, inverse_cdf, penalize, stream, uniform

if TYPE_CHECKING:
    from trl.rollouts.decoders import Sample

GENERATE_ONLY = {"num_beams": 1, "num_beam_groups": 1, "guidance_scale": 1, "token_healing": False, "use_mtp": False}
GENERATE_ONLY |= dict.fromkeys(("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens"))
GENERATE_ONLY |= dict.fromkeys(("constraints", "force_words_ids", "max_time"))
"""Options that change the decoding loop itself, which only `model.generate` supports, with their neutral values."""

PROCESSED = (
    {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "min_length": 0}
    | {"top_h": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
    | {"remove_invalid_values": False, "renormalize_logits": False}
    | dict.fromkeys(
        ("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "watermarking_config")
    )
    | dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"))
)
"""Options that change logits, with their neutral values: applied row by row by the logits processors of `transformers`."""


def options_set(params: SamplingParams, neutral: dict[str, Any]) -> list[str]:
    """Names of the options in `neutral` that `params.generation_config` sets to another value than the neutral one."""
    config = params.generation_config
    if config is None:
        return []
    # Which of them exist depends on the release of transformers.
    return [name for name, nothing in neutral.items() if getattr(config, name, None) not in (None, nothing)]


def full_config(params: SamplingParams, stops: Sequence[int], context: int, limit: int) -> GenerationConfig:
    """`params` as a `GenerationConfig`, for at most `limit` new tokens after `context` tokens."""
    rest = params.generation_config
    config = GenerationConfig() if rest is None else GenerationConfig.from_dict(rest.to_dict())
    drawn = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    for name, value in (drawn if not params.greedy else {}).items():
        setattr(config, name, value)
    config.do_sample = not params.greedy
    config.repetition_penalty = params.repetition_penalty
    config.min_new_tokens = params.min_new_tokens
    config.max_new_tokens, config.max_length = limit, context + limit
    config.eos_token_id = list(stops) or None
    if params.banned_tokens:
        config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *params.banned_tokens})
    return config


class Sampler:
    """Draws each row's next token. The rows are in the order of the decoder's rows.

    keys, positions  [B] int64: key of each row's random numbers, and how many tokens it has drawn
    seen             [B,V] bool: tokens that occur in a row's prompt or completion; None without repetition penalty
    """

    def __init__(
        self, params: SamplingParams, inner: PreTrainedModel, stops: Sequence[int], device: torch.device
    ) -> None:
        self.params, self.inner, self.device = params, inner, device
        self.stops = torch.tensor(sorted(stops), device=device, dtype=torch.long)
        self.keys = torch.empty(0, dtype=torch.long, device=device)
        self.positions = torch.empty(0, dtype=torch.long, device=device)
        self.seen: Tensor | None = None
        self.rows: list[Sample] = []
        self.contexts: dict[int, Sequence[int]] = {}
        self.processors: dict[int, LogitsProcessorList] = {}
        self.processed = bool(options_set(params, PROCESSED))
        self.mask = None if params.logit_mask is None else params.logit_mask.to(device)

    def admit(self, samples: Sequence[Sample], contexts: Sequence[Sequence[int]], vocabulary: int) -> None:
        """Add rows. The context of a row are the tokens before its first sampled one: the prompt, or of an encoder-decoder
        the decoder's start token."""
        index = torch.tensor([s.index for s in samples], device=self.device)
        number = torch.tensor([s.number for s in samples], device=self.device)
        self.keys = torch.cat([self.keys, stream(self.params.seed, index, number)])
        self.positions = torch.cat([self.positions, torch.zeros_like(index)])
        self.rows = [*self.rows, *samples]
        self.contexts |= {s.index: context for s, context in zip(samples, contexts, strict=True)}
        if self.params.repetition_penalty != 1:
            seen = torch.zeros(len(samples), vocabulary, dtype=torch.bool, device=self.device)
            for row, context in zip(seen, contexts, strict=True):
                row[torch.tensor(list(context), device=self.device)] = True
            self.seen = seen if self.seen is None else torch.cat([self.seen, seen])

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.device, dtype=torch.long)
        self.keys, self.positions = self.keys[index], self.positions[index]
        self.seen = None if self.seen is None else self.seen[index]
        self.rows = [self.rows[row] for row in rows]

    def sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their log-probabilities [B] under the unmodified policy, from logits [B,V] float32.

        With value guidance `logits` is [B,2,V]: the logits, then the action values.
        """
        logits, guided = self._guide(logits)
        if self.processed:
            tokens = self._draw_processed(guided, uniform(self.keys, self.positions))
        else:
            state = self.keys, self.positions, self.seen
            tokens = choose(guided, *state, self.params, self.stops, may_sync=True)
        self.positions = self.positions + 1
        return tokens, chosen_logprobs(logits, tokens, self.params.temperature)

    def _guide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        last = None
        if self.mask is not None:
            tokens = [row.ids[-1] if row.ids else self.contexts[row.index][-1] for row in self.rows]
            last = torch.tensor(tokens, device=self.device)
        return guide(logits, last, self.params, self.mask)

    def _draw_processed(self, logits: Tensor, u: Tensor) -> Tensor:
        scores = torch.cat([self._process(row, logits[i : i + 1]) for i, row in enumerate(self.rows)])
        return scores.argmax(-1) if self.params.greedy else inverse_cdf(scores.softmax(-1), u)

    def _process(self, row: Sample, logits: Tensor) -> Tensor:
        """Scores [1,V] after the logits processors that `generate` would run, for this row's own tokens without padding."""
        context = self.contexts[row.index]
        if row.index not in self.processors:
            self.processors[row.index] = self._processors(row, len(context))
        ids = torch.tensor([[*context, *row.ids]], device=self.device)
        return self.processors[row.index](ids, logits)

    def _processors(self, row: Sample, context: int) -> LogitsProcessorList:
        config = full_config(self.params, self.stops.tolist(), context, row.limit)
        self.inner._prepare_special_tokens(config, device=self.device)
        prompt = torch.tensor([list(row.prompt.ids)], device=self.device)
        return self.inner._get_logits_processor(
            config, input_ids_seq_length=context, encoder_input_ids=prompt, device=self.device
        )


def guide(logits: Tensor, last: Tensor | None, params: SamplingParams, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the policy's logits [B,V], and the logits [B,V] to draw from: with value guidance, mask and bans applied.

    The given logits are [B,V], or [B,2,V] with value guidance. `mask[u, v]` is true where token v may not follow token u;
    `last` [B] is the last token of each row. The state value V(s) is left out of the guidance, since the softmax cancels it.
    """
    guided = logits
    if params.beta:
        logits, values = logits.unbind(1)
        guided = logits + params.beta * values
    if mask is not None:
        guided = guided.masked_fill(mask[last], -torch.inf)
    if params.banned_tokens:
        vocabulary = torch.arange(guided.shape[-1], device=guided.device)
        for token in params.banned_tokens:
            guided = guided.masked_fill(vocabulary == token, -torch.inf)
    return logits, guided


def choose(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    seen: Tensor | None,
    params: SamplingParams,
    stops: Tensor,
    *,
    may_sync: bool,
) -> Tensor:
    """Tokens [B] drawn from logits [B,V].

    keys and positions [B] int64 give each row's random number. `seen` [B,V] marks the tokens of a row's prompt and
    completion (None without repetition penalty); drawn tokens are added to it in place. Tokens `stops` [S] are not drawn
    before `min_new_tokens`. With `may_sync` the host may wait for results of the device in order to skip needless work.
    """
    if seen is not None:
        logits = penalize(logits, seen, params.repetition_penalty)
    young = positions < params.min_new_tokens
    if params.min_new_tokens and len(stops) and (not may_sync or bool(young.any())):
        logits = ban(logits, stops, young)
    tokens = draw(logits, params, uniform(keys, positions), may_sync=may_sync)
    if seen is not None:
        seen.scatter_(1, tokens[:, None], True)
    return tokens
