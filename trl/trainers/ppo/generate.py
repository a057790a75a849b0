"""Samples responses to queries with the rollout engine, from the options of `model.generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from trl.errors import ConfigError, DataError, suggest
from trl.rollouts.engine import Prompt, RolloutEngine
from trl.rollouts.sampling import SamplingParams

DEFAULT_LENGTH = 20
"""Default number of new tokens, as in `transformers`."""

LONGEST = 2**31
"""Number of new tokens for all, if `length_sampler` limits each response instead."""


def prompts_of(
    queries: Sequence[Tensor],
    length_sampler: Callable[[], int] | None,
    inputs: Sequence[Mapping[str, Tensor]] | None = None,
) -> list[Prompt]:
    """The queries as prompts with their `inputs`; `length_sampler` draws the number of new tokens of each."""
    for i, query in enumerate(queries):
        if not isinstance(query, Tensor) or query.dim() != 1:
            found = tuple(query.shape) if isinstance(query, Tensor) else type(query).__name__
            raise DataError(f"query_tensor[{i}] has to be a tensor of token ids of shape [L], got {found}.")
    lengths = [None if length_sampler is None else length_sampler() for _ in queries]
    if inputs is not None and len(inputs) != len(queries):
        raise DataError(f"query_inputs has {len(inputs)} entries for {len(queries)} queries: give one for each.")
    beside = inputs or [{}] * len(queries)
    rows = zip(queries, beside, lengths, strict=True)
    return [Prompt(query.tolist(), own, max_new_tokens=n) for query, own, n in rows]


def sampling_params(
    defaults: GenerationConfig, options: dict[str, Any], *, sampled_length: bool = False
) -> SamplingParams:
    """The sampling parameters of `model.generate(**options)`, for a model with these `defaults`.

    A `generation_config` among the options overrides the defaults, and is overridden by the other options. Raises
    ConfigError for options that `GenerationConfig` does not have.
    """
    config = copy.deepcopy(defaults)
    if (given := options.pop("generation_config", None)) is not None:
        config.update(**given.to_diff_dict())
    for name in config.update(**options):
        raise ConfigError(
            f"generate() has no option {name!r}.{suggest(name, config.to_dict())} It takes a generation_config, and the "
            "fields of one (max_new_tokens, do_sample, top_k, …). Sample with trainer.model.generate for anything else."
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    changes: dict[str, Any] = {"stop_token_ids": [token for token in ends if token is not None and token >= 0]}
    changes["ignore_eos"] = config.eos_token_id is not None
    if (config.min_length or 0) <= 0:
        config.min_length = None
    if sampled_length:
        config.max_new_tokens = LONGEST
    elif config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = DEFAULT_LENGTH
    return SamplingParams.from_generation_config(config, **changes)


def sample(
    engine: RolloutEngine,
    model: nn.Module,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    batch_size: int | None,
    *,
    step: int,
    end: int | None,
) -> list[list[int]]:
    """Token ids of one response to each prompt, sampled from `model` at `step`, at most `batch_size` at a time.

    Responses are cut after their first token `end`, unless it is None.
    """
    size = batch_size or max(1, len(prompts))
    engine.sync(model, step)
    parts = (engine.generate(prompts[i : i + size], params, 1) for i in range(0, len(prompts), size))
    found = [list(rollout.ids) for part in parts for (rollout,) in part]
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in found]
