"""Evaluate samples of the same prompts under several sets of sampling options, by rewards and other metrics.

    found = SampledEvaluation(rows, {"@beta=0": …, "@beta=1": …}, rewards, metric_fn)(engine, tokenizer)
    found.metrics                    {"reward@beta=0": 0.3, "reward@beta=1": 0.8, "optimality@beta=0": …}
    found.samples                    prompt, completion and scores of each

Options given as lists are swept: `swept({"beta": [0, 1], "top_k": 20})` gives two sets of options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trl.errors import DataError
from trl.rewards.call import call_rewards
from trl.rewards.reward import Reward, Samples
from trl.rewards.signature import fitting
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine
from trl.rollouts.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MetricFunction = Callable[..., Mapping[str, Sequence[float]]]

LISTS = frozenset(("begin_suppress_tokens", "constraints", "eos_token_id", "sequence_bias", "suppress_tokens"))
LISTS |= {"bad_words_ids", "force_words_ids", "stop", "stop_strings", "stop_token_ids"}
"""Options whose single value is already a list: they are not swept."""

NOT_COLUMNS = ("prompt", "prompt_ids")
"""Columns that are not passed to functions under their own names."""


def swept(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All combinations of the options given as lists, by a suffix that names the values: `{"@beta=0": {"beta": 0, …}, …}`."""
    varied = {name: value for name, value in options.items() if isinstance(value, list | tuple) and name not in LISTS}
    combinations = (dict(zip(varied, values, strict=True)) for values in product(*varied.values()))
    return {"".join(f"@{name}={value}" for name, value in each.items()): {**options, **each} for each in combinations}


@dataclass(frozen=True)
class JudgedSample:
    """A prompt, a completion sampled for it, and the scores that functions gave it, by name and suffix."""

    prompt: str
    completion: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class SampledMetrics:
    """Means over all samples, by name and suffix, and the samples themselves."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[JudgedSample] = field(default_factory=list)


@dataclass(frozen=True)
class SampledEvaluation:
    """Prompts, sampling parameters and functions of an evaluation; calling it samples and scores.

    rows        with `prompt` and `prompt_ids`; other columns are passed to the functions, one value per sample
    params      sampling parameters, by the suffix of their metrics
    rewards     reward functions; their weighted sum is the metric `reward`
    metric_fn   (prompts, completions, completion_ids, **columns) -> {name: one number per sample}
    n           completions of each prompt
    """

    rows: Sequence[Mapping[str, Any]]
    params: Mapping[str, SamplingParams]
    rewards: Sequence[Reward] = ()
    metric_fn: MetricFunction | None = None
    n: int = 1

    def __call__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[Any], list[Any]] = lambda own: [own],
    ) -> SampledMetrics:
        """Sample and score. Process `rank` of `world` takes its share of the rows; `gather` collects the results of all."""
        own = [self._sample(engine, tokenizer, suffix, rank, world) for suffix in self.params]
        everywhere = [each for part in gather([each for found in own for each in found]) for each in part]
        return SampledMetrics(_means(everywhere), everywhere)

    def _sample(
        self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, suffix: str, rank: int, world: int
    ) -> list[JudgedSample]:
        rows = self.rows[rank::world]
        sampled = engine.generate([Prompt(row["prompt_ids"]) for row in rows], self.params[suffix], self.n)
        samples = samples_of(rows, sampled, tokenizer)
        if not rows:
            return []
        scores = {**self._rewarded(samples), **self._measured(samples)}
        names = [name + suffix for name in scores]
        numbers = zip(*scores.values(), strict=True) if scores else [()] * len(samples)
        texts = zip(samples.prompts, samples.completions, numbers, strict=True)
        return [JudgedSample(p, c, dict(zip(names, each, strict=True))) for p, c, each in texts]

    def _rewarded(self, samples: Samples) -> dict[str, list[float]]:
        if not self.rewards:
            return {}
        values = call_rewards(self.rewards, samples).values
        weights = torch.tensor([reward.weight for reward in self.rewards])
        found = {"reward": (values * weights).nansum(1)}
        if len(self.rewards) > 1:
            found |= {f"rewards/{reward.name}": values[:, i] for i, reward in enumerate(self.rewards)}
        return {name: column.tolist() for name, column in found.items()}

    def _measured(self, samples: Samples) -> dict[str, list[float]]:
        if self.metric_fn is None:
            return {}
        found = self.metric_fn(**fitting(self.metric_fn, samples.keywords))
        return {name: _checked(name, values, len(samples)) for name, values in found.items()}


def samples_of(
    rows: Sequence[Mapping[str, Any]],
    sampled: Sequence[Sequence[Rollout]],
    tokenizer: PreTrainedTokenizerBase,
) -> Samples:
    """The samples as functions receive them: texts, token ids, and the other columns of the rows, one value per sample."""
    repeated = [row for row, rollouts in zip(rows, sampled, strict=True) for _ in rollouts]
    ids = [list(rollout.ids) for rollouts in sampled for rollout in rollouts]
    names = [name for name in (rows[0] if rows else ()) if name not in NOT_COLUMNS]
    columns = {name: [row[name] for row in repeated] for name in names}
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Samples([row["prompt"] for row in repeated], texts, {**columns, "completion_ids": ids})


def _checked(name: str, values: Any, count: int) -> list[float]:
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(values) != count:
        raise DataError(
            f"metric_fn returned {len(values)} values of {name!r} for {count} samples: return one value per sample."
        )
    return [float(value) for value in values]


def _means(samples: Sequence[JudgedSample]) -> dict[str, float]:
    """The mean of every score over the samples that have it, without NaN."""
    names = dict.fromkeys(name for sample in samples for name in sample.scores)
    columns = {name: torch.tensor([s.scores[name] for s in samples if name in s.scores]).double() for name in names}
    return {name: column.nanmean().item() for name, column in columns.items()}
