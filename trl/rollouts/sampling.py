"""How the next token is drawn, and which log-probability is reported for it.

With logits z of one position and temperature τ:

    log π(v) = z_v/τ − log Σ_u exp(z_u/τ)                      reported, before all modifications below
    z′       = z + β min_i Q′_i(s, ·)                          value guidance (Snell et al. 2022, ILQL); then
    z′       = penalty and bans applied to z′                  repetition penalty (Keskar et al. 2019, section 4.1)
    q(v)     ∝ exp(z′_v/τ) · [v among the top k] · [v in the nucleus of mass p] · [q_v ≥ min_p · max q]
    token    = min {v : Σ_{u≤v} q(u) > U},   U uniform on [0, 1)

Nucleus: Holtzman et al. 2020, section 3.1 (the smallest set of most likely tokens whose mass reaches top_p, taken
after top-k). min-p: Nguyen et al. 2024, section 3. U is a hash of (seed, prompt, sample, position), so that a sample
does not depend on the rest of the batch. Of equal logits, the lower token id comes first. Logits themselves change by about
1e-6 with the batch shape: if U is that close to a boundary, or the two largest logits are that close, the token may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl.errors import ConfigError, DataError
from trl.option_bounds import check_number, check_numeric

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

BLOCK = 256
"""Tokens per block: a token is drawn by finding its block from the blocks' sums, then searching within the block."""

NUCLEUS = 512
"""Top-p sorts this many most likely tokens first, and the whole vocabulary only if they do not reach `top_p`."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample and when to stop. `from_generation_config` makes one from a `GenerationConfig`."""

    temperature: float = 1.0
    """Divides the logits. 0 is greedy decoding; log-probabilities are then reported at temperature 1."""

    top_k: int = 0
    """Sample among this many most likely tokens; 0 for all."""

    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probabilities reach this sum."""

    min_p: float = 0.0
    """Sample only tokens at least this fraction as likely as the most likely one."""

    repetition_penalty: float = 1.0
    """Positive logits of tokens seen in prompt or completion are divided by it, negative ones multiplied."""

    stop: tuple[str, ...] = ()
    """Strings that end a completion; the string stays part of the completion."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's end-of-sequence tokens."""

    ignore_eos: bool = False
    """Do not stop at end-of-sequence tokens."""

    max_new_tokens: int = 256
    """Most tokens to sample."""

    min_new_tokens: int = 0
    """Least tokens of a completion: until then no stop string ends it, and stop tokens are not sampled."""

    seed: int | None = None
    """The same seed gives the same samples. The random numbers depend on the seed and the index of a prompt in the call, so give
    every rollout batch and every process a seed of its own. None draws one from torch's random state at every call."""

    banned_tokens: tuple[int, ...] = ()
    """Tokens that are never sampled. Image tokens are never sampled either, and need not be listed."""

    beta: float = 0.0
    """β of value guidance: adds β · min Q′ of every token to the logits. Needs a model with ILQL heads."""

    logit_mask: Tensor | None = field(default=None, compare=False)
    """[V,V] bool: where `logit_mask[u, v]` is true, token v is never sampled directly after token u."""

    generation_config: GenerationConfig | None = None
    """Further options of `transformers`, which have no field here (bad words, n-gram bans, beams, …)."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "banned_tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value or ()))
        check_numeric(self)
        for name in (*_SAME, "beta"):
            check_number(name, getattr(self, name))
        if "" in self.stop:
            raise ConfigError("stop contains an empty string, which occurs in every text: remove it.")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}: "
                "lower the first or raise the second."
            )
        _check_agreement(self)
        _check_mask(self.logit_mask)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_generation_config(cls, config: GenerationConfig, **changes: Any) -> SamplingParams:
        """The parameters that `config` describes; options without a field here are kept in `generation_config`.

        `do_sample` false or unset gives temperature 0. The config's end-of-sequence tokens replace those of the model. Unlike
        in `generate`, which defaults to 50, an unset top_k truncates nothing. `changes` override fields of the result.
        """
        given = {ours: getattr(config, theirs) for ours, theirs in _SHARED.items()}
        fields = {name: value for name, value in given.items() if value is not None}
        rest = type(config).from_dict(config.to_dict())
        for theirs in (*_SHARED.values(), "do_sample", "eos_token_id"):
            setattr(rest, theirs, None)
        if not config.do_sample:
            fields["temperature"] = 0.0
        if config.eos_token_id is not None:
            fields |= {"stop_token_ids": config.eos_token_id, "ignore_eos": True}
        if "max_new_tokens" in fields:
            rest.max_length = None
        elif config.max_length is not None:
            fields["max_new_tokens"] = config.max_length
        return cls(**(fields | {"generation_config": rest} | changes))


_SAME = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
_SHARED = {name: name for name in _SAME} | {"stop": "stop_strings"}


def _check_agreement(params: SamplingParams) -> None:
    """Raise ConfigError where an option is given here and in the `GenerationConfig` with two different values."""
    config = params.generation_config
    for ours, theirs in _SHARED.items() if config is not None else ():
        value = getattr(config, theirs)
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and value != getattr(params, ours):
            raise ConfigError(
                f"generation_config.{theirs}={value!r} but SamplingParams.{ours}={getattr(params, ours)!r}: "
                "use SamplingParams.from_generation_config(config), which reads both."
            )


def _check_mask(mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.dim() != 2 or len(mask) != mask.shape[1]:
        raise ConfigError(
            f"logit_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: give [V,V] of bool, true where a token may not "
            "follow another."
        )
    if (dead := mask.all(1).nonzero().flatten()).numel():
        raise ConfigError(
            f"logit_mask forbids every token after token {int(dead[0])}: allow at least one, such as the end-of-sequence token."
        )


def asked_limit(params: SamplingParams, ids: Sequence[int], own: int | None, index: int) -> int:
    """Most new tokens for `prompts[index]`, whose token ids are `ids`: the lower of its own limit and that of `params`.

    Raises DataError for a prompt without tokens, and for a limit below 1.
    """
    if not len(ids):  # not `if not ids`: of a tensor with one element that would test the value
        raise DataError(f"prompts[{index}] is empty: give at least one token (a beginning-of-sequence token, say).")
    if own is not None and own < 1:
        raise DataError(f"prompts[{index}] has max_new_tokens={own}: give at least 1, or None.")
    return params.max_new_tokens if own is None else min(own, params.max_new_tokens)


def with_limit(params: SamplingParams, limit: int) -> SamplingParams:
    """The parameters with `max_new_tokens` set to `limit` (at least 1), and `min_new_tokens` lowered to it."""
    return replace(params, max_new_tokens=limit, min_new_tokens=min(params.min_new_tokens, limit))


def with_seed(params: SamplingParams) -> SamplingParams:
    """The parameters with a seed: their own, or one drawn from torch's random state."""
    return params if params.seed is not None else replace(params, seed=int(torch.randint(2**62, ()).item()))


def with_stop_tokens(params: SamplingParams, base: Any, tokenizer: PreTrainedTokenizerBase | None) -> SamplingParams:
    """The parameters with the end-of-sequence tokens of model and tokenizer added to `stop_token_ids`, unless `ignore_eos`."""
    if params.ignore_eos:
        return params
    eos = base.generation_config.eos_token_id
    found = {*params.stop_token_ids, *(eos if isinstance(eos, list) else [eos])}
    if tokenizer is not None:
        found.add(tokenizer.eos_token_id)
    return replace(params, stop_token_ids=tuple(sorted(found - {None})))


def with_banned(params: SamplingParams, tokens: Iterable[int]) -> SamplingParams:
    """The parameters with `tokens` added to `banned_tokens`."""
    banned = tuple(sorted({*params.banned_tokens, *tokens}))
    return params if banned == params.banned_tokens else replace(params, banned_tokens=banned)


# ── random numbers ──────────────────────────────────────────────────────────────────────────────────────────────


def _wrap(number: int) -> int:
    """The signed int64 with the bit pattern of the unsigned 64-bit `number`."""
    return (number + 2**63) % 2**64 - 2**63


_GOLDEN, _MIX1, _MIX2 = map(_wrap, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014, figure 14). int64 of any shape; shifts are logical."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX2
    return z ^ ((z >> 31) & (2**33 - 1))


def stream(seed: int, prompt: Tensor, sample: Tensor) -> Tensor:
    """Keys [B] of the samples' random numbers, from the indices [B] int64 of their prompts and of the samples themselves."""
    root = _mix(torch.full_like(prompt, _wrap(seed % 2**64)) + _GOLDEN)
    return _mix(_mix(root + prompt * _GOLDEN) + sample * _GOLDEN)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform random numbers U [B] float64 in [0, 1), 53 bits: number `positions` [B] int64 of the streams `keys` [B]."""
    bits = _mix(keys + (positions + 1) * _GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


# ── choosing a token ────────────────────────────────────────────────────────────────────────────────────────────


def _search(weights: Tensor, u: Tensor) -> Tensor:
    """First index [B,1] at which the cumulative weight exceeds u · total; weights [B,K] ≥ 0, u [B] float64 in [0, 1)."""
    cumulative = weights.double().cumsum(-1)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).clamp(max=weights.shape[1] - 1)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Draw tokens [B] ~ weights [B,V] ≥ 0 (unnormalised), by one uniform number u [B] float64 per row.

    The sums of blocks of tokens give the block; u, rescaled to the block, gives the token in it. This takes one vectorised
    pass over V, and no cumulative sum over V.
    """
    rows, vocabulary = weights.shape
    whole = vocabulary // BLOCK * BLOCK
    sums = torch.cat(
        [weights[:, :whole].view(rows, whole // BLOCK, BLOCK).sum(-1), weights[:, whole:].sum(-1, True)], 1
    ).double()
    block = _search(sums, u)
    before = sums.cumsum(-1) - sums
    inside = (u[:, None] * sums.sum(-1, True) - before.gather(1, block)) / sums.gather(1, block)
    tokens = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    candidates = weights.gather(1, tokens.clamp(max=vocabulary - 1)).masked_fill(tokens >= vocabulary, 0)
    token = block * BLOCK + _search(candidates, inside[:, 0].clamp(0, 1 - 2.0**-53))
    return token.clamp(max=vocabulary - 1).squeeze(1)  # weights of NaN give an index beyond the vocabulary


def _draw_sorted(probabilities: Tensor, tokens: Tensor, params: SamplingParams, u: Tensor) -> Tensor:
    """Draw tokens [B] from candidates [B,K] in descending order, after top-p and min-p.

    A candidate is in the nucleus if the probabilities of those before it sum to less than `top_p`.
    """
    above = probabilities.double().cumsum(-1) - probabilities
    kept = (above < params.top_p) & (probabilities >= params.min_p * probabilities[:, :1])
    return tokens.gather(1, _search(probabilities * kept, u)).squeeze(1)


def _nucleus_candidates(probabilities: Tensor, top_p: float, *, may_sync: bool) -> Any:
    """Probabilities and tokens `[B,K]` in descending order that contain the nucleus of mass `top_p`."""
    best = probabilities.topk(min(NUCLEUS, probabilities.shape[1])) if may_sync else None
    if best is None or bool((best.values.double().sum(-1) < top_p).any()):
        best = probabilities.sort(dim=-1, descending=True, stable=True)
    return best


def draw(logits: Tensor, params: SamplingParams, u: Tensor, *, may_sync: bool = True) -> Tensor:
    """Draw tokens [B] from logits [B,V] by uniform numbers u [B] float64, with temperature and truncation of `params`.

    For top-p with `may_sync`, the host checks whether the `NUCLEUS` most likely tokens are enough, which waits for the device;
    else the whole vocabulary is sorted.
    """
    if params.greedy:
        return logits.argmax(-1)
    scaled = logits if params.temperature == 1 else logits / params.temperature
    if params.top_k:
        best = scaled.topk(min(params.top_k, scaled.shape[1]))
        return _draw_sorted(best.values.softmax(-1), best.indices, params, u)
    probabilities = scaled.softmax(-1)
    if params.top_p < 1:
        best = _nucleus_candidates(probabilities, params.top_p, may_sync=may_sync)
        return _draw_sorted(best.values, best.indices, params, u)
    if params.min_p:
        floor = params.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0)
    return inverse_cdf(probabilities, u)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty: divide positive logits [B,V] of `seen` [B,V] tokens by it, multiply negative ones."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def ban(logits: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Logits [B,V] with those of `tokens` [S] set to −∞ in the rows where `rows` [B] is true."""
    return logits.index_copy(1, tokens, logits[:, tokens].masked_fill(rows[:, None], -torch.inf))


def chosen_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log π [B] of tokens [B] under the unmodified policy: log-softmax of logits [B,V] / temperature (1 if 0)."""
    scaled = logits if temperature in (0, 1) else logits / temperature
    return scaled.gather(1, tokens[:, None]).squeeze(1) - scaled.logsumexp(-1)
