"""The statistics that a step of PPO returns, by the names of the classic interface."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.ops.reduce import masked_mean
from trl.types import Example, Experience


class Stopwatch:
    """Measures the seconds between calls of `lap`, by name."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Record the time since the last call under `name`."""
        now = time.perf_counter()
        self.seconds[f"time/ppo/{name}"] = now - self.last
        self.last = now

    def total(self) -> dict[str, float]:
        return {**self.seconds, "time/ppo/total": time.perf_counter() - self.started}


def warn_of_skipped(ratios: Sequence[Tensor], threshold: float) -> None:
    """Warn of minibatches that were skipped, each given by the probability ratios of its tokens."""
    skipped = sum(not ratio.mean() <= threshold for ratio in ratios)
    if skipped:
        warnings.warn(
            f"{skipped} of {len(ratios)} mini-batches were skipped, because their mean probability ratio was above "
            f"ratio_threshold={threshold}: the policy has moved too far from the one that sampled. Lower learning_rate or "
            "ppo_epochs.",
            stacklevel=3,
        )


def step_statistics(
    examples: Sequence[Example],
    experience: Experience,
    coefficient: float,
    ratios: Sequence[Tensor],
    trained: Mapping[str, float],
    gather: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """The statistics of a step: of its triplets, of their experience, and of the optimizer steps.

    coefficient   the KL penalty's coefficient that the rewards were computed with
    ratios        probability ratios of the tokens of each minibatch
    trained       metrics of the optimizer steps, averaged
    gather        stacks the tensors `[1,…]` of all processes
    """
    means = mean_over_processes(rollout_means(experience, coefficient), gather)
    return {
        **means,
        **training_means(trained, means["ppo/returns/var"]),
        **distributions(experience, ratios),
        **token_counts(examples),
        "objective/kl_coef": coefficient,
    }


def rollout_means(experience: Experience, coefficient: float) -> dict[str, Tensor]:
    """Means over the batch of quantities that are known before training on it."""
    mask, signals = experience.mask, experience.signals
    scores = signals["scores"]
    non_score = -coefficient * signals["kl"]
    value_mean, value_var = _moments(signals["values"], mask)
    return_mean, return_var = _moments(signals["returns"], mask)
    return {
        "objective/kl": (signals["kl"] * mask).sum(1).mean(),
        "objective/entropy": -(signals["old_logprobs"] * mask).sum(1).mean(),
        "ppo/mean_non_score_reward": masked_mean(non_score, mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": scores.std(correction=min(1, len(scores) - 1)),
        "ppo/val/mean": value_mean,
        "ppo/val/var": value_var,
        "ppo/returns/mean": return_mean,
        "ppo/returns/var": return_var,
    }


TRAINED = (
    "policy/entropy",
    "policy/approxkl",
    "policy/policykl",
    "policy/clipfrac",
    "policy/advantages_mean",
    "val/vpred",
    "val/error",
    "val/clipfrac",
    "loss/policy",
    "loss/value",
    "loss/total",
)
"""Metrics of `trl.algorithms.ppo` that a step reports; NaN where every optimizer step was skipped."""


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    mean = masked_mean(x, mask)
    return mean, ((x - mean).square() * mask).sum() / (mask.sum() - 1).clamp(min=1)


def token_counts(examples: Sequence[Example]) -> dict[str, Any]:
    """Lengths of queries and responses."""
    found: dict[str, Any] = {}
    for name, lengths in (
        ("queries", [len(example.prompt) for example in examples]),
        ("responses", [len(example.completions[0]) for example in examples]),
    ):
        dist = np.array(lengths, dtype=np.float32)
        found |= {
            f"tokens/{name}_len_mean": float(dist.mean()),
            f"tokens/{name}_len_std": float(dist.std(ddof=min(1, len(dist) - 1))),
            f"tokens/{name}_dist": dist,
        }
    return found


def distributions(experience: Experience, ratios: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Arrays of this process: `[N]` per response, `[N,C]` per token, or flat with scored tokens only."""
    signals, scored = experience.signals, experience.mask.bool()
    return {
        "objective/kl_dist": _array((signals["kl"] * experience.mask).sum(1)),
        "objective/logprobs": _array(signals["old_logprobs"]),
        "objective/ref_logprobs": _array(signals["ref_logprobs"]),
        "ppo/policy/advantages": _array(signals["advantages"][scored]),
        "ppo/policy/ratio": _array(torch.cat(list(ratios))),
    }


def training_means(found: Mapping[str, float], returns_var: float) -> dict[str, float]:
    """The meter's means by their reported names, and the explained variance of the returns, 1 − E[(R − V)²] / Var R."""
    means = {f"ppo/{name}": found.get(name, float("nan")) for name in TRAINED}
    explained = 1 - means["ppo/val/error"] / returns_var if returns_var > 0 else float("nan")
    return {**means, "ppo/val/var_explained": explained}


def mean_over_processes(values: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Scalars averaged over the processes. `gather` stacks the tensors `[1,…]` of all processes."""
    row = torch.stack([value.float() for value in values.values()])[None]
    return dict(zip(values, gather(row).mean(0).tolist(), strict=True))


def environment(rewards: Tensor) -> dict[str, Any]:
    """Mean, standard deviation and distribution of the environment's rewards `[N]`."""
    dist = _array(rewards)
    return {"env/reward_mean": float(dist.mean()), "env/reward_std": float(dist.std()), "env/reward_dist": dist}


def _array(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
