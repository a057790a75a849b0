"""Call reward functions, and check their results before they are trained on.

A function returns one number per sample, or None where it does not apply. It is passed the arguments that it names, or all of
them if it takes `**columns`. A function fails if it raises, takes too long, or returns anything but one number within float32
(or None) per sample. A failure is an error that names the function and the sample; with on_error="drop", the sample is not
trained on instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.counts import counted
from trl.errors import ConfigError, TrlError, unknown
from trl.rewards.reward import Reward, Samples
from trl.rewards.running import Outcome, outcomes_of
from trl.rewards.worker import ProcessEnded

ON_ERROR = ("stop", "drop")
MOST_COSTLY = 3


class RewardError(TrlError):
    """A reward function failed, or returned something else than rewards."""


@dataclass(frozen=True)
class Rewarded:
    """Rewards: `values` [N,F], NaN where a function did not apply; `failed` [N,F] bool, where it failed and was dropped."""

    values: Tensor
    failed: Tensor


def warn_of_none(rewards: Sequence[Reward], found: Rewarded) -> None:
    """Warn, once in a run, about samples for which every function returned None."""
    if none := int((found.values.isnan().all(1) & ~found.failed.any(1)).sum()):
        names = ", ".join(reward.name for reward in rewards)
        rewards[0].warn_once(
            "none",
            f"{none} of {len(found.values)} samples got no reward: {names} returned None for them, so they are not trained on. "
            "A function returns None where it does not apply; at least one function should apply.",
        )


def call_rewards(
    rewards: Sequence[Reward], samples: Samples, *, timeout: float | None = None, on_error: str | None = None
) -> Rewarded:
    """The rewards of `samples` by every function. `timeout` is in seconds, per call.

    A failure raises RewardError, with function and sample, unless `on_error` is "drop". `on_error` None is like "stop", for
    callers that cannot drop samples.
    """
    if on_error is not None and on_error not in ON_ERROR:
        raise ConfigError(unknown("on_reward_error", on_error, ON_ERROR))
    outcomes = outcomes_of(rewards, samples, timeout)
    columns = [_column(r, o, samples, timeout, on_error) for r, o in zip(rewards, outcomes, strict=True)]
    values = torch.tensor([[math.nan if v is None else v for v in values] for values, _ in columns]).T
    failed = torch.tensor([failed for _, failed in columns], dtype=torch.bool).T
    return Rewarded(values.float().reshape(len(samples), len(rewards)), failed.reshape(len(samples), len(rewards)))


@dataclass(frozen=True)
class Failure:
    """Why a function failed for a sample."""

    reason: str
    cause: BaseException | None = None


def _column(
    reward: Reward, outcome: Outcome, samples: Samples, timeout: float | None, on_error: str | None
) -> tuple[list[float | None], list[bool]]:
    """The rewards of one function, and which samples failed."""
    if isinstance(outcome, BaseException):
        judged = _one_by_one(reward, outcome, samples, timeout, stops=on_error != "drop")
    else:
        judged = _judged(outcome, len(samples))
    failures = {i: each for i, each in enumerate(judged) if isinstance(each, Failure)}
    if failures:
        i, failure = next(iter(failures.items()))
        what = _message(reward, samples, i, failure.reason, len(failures))
        if on_error != "drop":
            others = ", or set on_reward_error='drop' to train on the other samples" if on_error == "stop" else ""
            raise RewardError(f"{what} Fix the function{others}.") from failure.cause
        reward.warn_once("failures", f"{what} Such samples are not trained on, and are counted in failed_rewards.")
    values = [None if i in failures else each for i, each in enumerate(judged)]
    return values, [i in failures for i in range(len(samples))]


def _judged(outcome: Any, count: int) -> list[float | Failure | None]:
    """The rewards of `count` samples, or the reasons why they are invalid."""
    if not _is_list(outcome):
        reason = f"gave a {type(outcome).__name__}: it has to give a list with one number per sample"
        return [Failure(reason)] * count
    if len(outcome) != count:
        reason = f"gave {counted(len(outcome), 'reward')} for {counted(count, 'sample')}: it has to give one each"
        return [Failure(reason)] * count
    return [Failure(wrong) if (wrong := _wrong(v)) else None if v is None else float(v) for v in outcome]


def _one_by_one(
    reward: Reward, error: BaseException, samples: Samples, timeout: float | None, *, stops: bool
) -> list[float | Failure | None]:
    """Call a function that has failed for all samples together once for each sample, to find those that fail.

    If none fails on its own, all samples count as failed. Samples that time out or end the process are costly: if the run
    stops anyway, no further sample is tried after the first of them; with on_error="drop", none after the third.
    """
    judged: list[float | Failure | None] = []
    costly = 0
    while len(judged) < len(samples) and costly < (1 if stops else MOST_COSTLY):
        (alone,) = outcomes_of([reward], samples.one(len(judged)), timeout)
        costly += isinstance(alone, TimeoutError | ProcessEnded)
        judged += [Failure(_reason(alone, timeout), alone)] if isinstance(alone, BaseException) else _judged(alone, 1)
    judged += [None if stops else Failure("was not tried after others")] * (len(samples) - len(judged))
    if any(isinstance(each, Failure) for each in judged):
        return judged
    return [Failure(_reason(error, timeout), error)] * len(samples)


def _is_list(outcome: Any) -> bool:
    """True if the outcome is a list of values: neither a tensor without dimensions, nor a text, mapping or set."""
    if isinstance(outcome, Tensor | np.ndarray):
        return outcome.ndim > 0
    return isinstance(outcome, Sized) and not isinstance(outcome, str | Mapping | Set)


def _reason(error: BaseException, timeout: float | None) -> str:
    if isinstance(error, TimeoutError) and timeout is not None:
        return f"took longer than {timeout:g} s"
    if isinstance(error, ProcessEnded):
        return str(error)
    return f"raised {type(error).__name__}: {error}"


def _wrong(value: Any) -> str:
    """What is wrong with one reward, in words; empty if nothing is."""
    if value is None:
        return ""
    try:
        number = None if isinstance(value, str) else float(value)
    except OverflowError:
        return f"gave {_short(value)}, which float32 cannot hold"
    except Exception:  # a value's own __float__ may raise anything
        number = None
    if number is None:
        return f"gave a {type(value).__name__} ({_short(value, 60)}) where a number belongs"
    if math.isfinite(number) and abs(number) > torch.finfo(torch.float32).max:
        return f"gave {number}, which float32 cannot hold"
    return "" if math.isfinite(number) else f"gave {number} (None says that it does not apply)"


def _message(reward: Reward, samples: Samples, i: int, reason: str, failures: int) -> str:
    others = f", as {failures - 1} of the others" if failures > 1 else ""
    return (
        f"Reward function {reward.name!r} {reason}. Sample {i + 1} of {len(samples)}{others}: prompt "
        f"{_short(samples.prompts[i])}, completion {_short(samples.completions[i])}."
    )


def _short(value: Any, most: int = 100) -> str:
    try:
        text = repr(value)
    except Exception as error:  # integers of thousands of digits, and values whose own __repr__ raises
        text = f"{type(value).__name__} ({error})"
    return text if len(text) <= most else text[: most - 1] + "…"
