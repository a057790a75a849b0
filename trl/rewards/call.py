"""Calling reward functions: what a user's function gives, checked before anything is learned from it.

    reward(prompts=[…], completions=[…], completion_ids=[…], **columns) -> [1.0, None, …]

One number per sample; None where the function does not apply. A function is given the arguments that it names, all of them
if it takes `**columns`. Functions may be async: those of one rollout batch run at the same time. What raises, takes too long, or
gives anything else than one number that float32 holds (or None) per sample is an error that names function and sample, or,
with on_error="drop", a sample that is not learned from.

With a timeout, a function runs in a process of its own (`worker.py`), so that the limit holds for any code. Reward models
and people stay in this process.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from trl.counts import counted
from trl.errors import ConfigError, TrlError, unknown
from trl.models.names import explain_missing
from trl.rewards.classifier import ClassifierReward
from trl.rewards.model import RewardModel
from trl.rewards.signature import check_arguments, fitting, say_hidden
from trl.rewards.worker import ProcessEnded, Worker, WorkerError, called

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., "Sequence[float | None] | Awaitable[Sequence[float | None]]"]
ON_ERROR = ("stop", "drop")
MOST_COSTLY = 3


class RewardError(TrlError):
    """A reward function that failed, or gave something else than rewards."""


@dataclass(frozen=True)
class Reward:
    """A reward function, its name in logs, and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    dropped: list[str] = field(default_factory=list, compare=False, repr=False)
    """The failure that was logged, where failures are dropped."""

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__)

    def keywords(self, samples: Samples) -> dict[str, Any]:
        """What the function asks for, of the samples."""
        return fitting(self.function, samples.keywords)

    @functools.cached_property
    def worker(self) -> Worker | None:
        """The function in a process of its own; None if it has to stay in this one, which is said."""
        if getattr(self.function, "runs_in_trainer", False):
            return None
        try:
            return Worker(self.function)
        except WorkerError as error:
            self.stay(error)
            return None

    def begin(self, samples: Samples, timeout: float | None) -> Callable[[], Any]:
        """Let the function begin, in a process of its own where there is a time limit; what waits for its result."""
        keywords = self.keywords(samples)
        if timeout is None:
            return lambda: self.function(**keywords)
        if self.worker is not None:
            try:
                self.worker.send(keywords)
                return functools.partial(self.worker.receive, time.monotonic() + timeout)
            except WorkerError as error:
                self.stay(error)
        return lambda: _in_thread(lambda: called(self.function, keywords), timeout)

    def stay(self, error: WorkerError) -> None:
        """Keep the function in this process from now on."""
        vars(self)["worker"] = None
        logger.warning(
            f"Reward function {self.name!r} runs in the trainer's own process, where reward_timeout cannot end code that "
            f"never yields: {error}. A function of a module that can be imported runs in one of its own."
        )

    def say_dropped(self, failure: str) -> None:
        """Log the first failure whose samples are dropped."""
        if not self.dropped:
            self.dropped.append(failure)
            logger.warning(
                f"{failure} Such samples are not learned from, and counted in failed_rewards. This is said once."
            )


@dataclass(frozen=True)
class Samples:
    """What is to be rewarded. `columns` hold one value per sample; `extras` are handed to every call as they are."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def one(self, i: int) -> Samples:
        """Sample i alone."""
        own = slice(i, i + 1)
        columns = {name: values[own] for name, values in self.columns.items()}
        return replace(self, prompts=self.prompts[own], completions=self.completions[own], columns=columns)

    @property
    def keywords(self) -> dict[str, Any]:
        """What functions are given by name. What was sampled goes before columns of the same names."""
        return {**self.columns, "prompts": self.prompts, "completions": self.completions, **self.extras}


@dataclass(frozen=True)
class Rewarded:
    """values [N,F], NaN where a function did not apply; failed [N,F] bool, with on_error="drop"."""

    values: Tensor
    failed: Tensor


def warn_of_none(rewards: Sequence[Reward], found: Rewarded, has_said: bool) -> bool:
    """Warn, once in a run, of samples for which every function gave None. Returns whether that has been said."""
    none = int((found.values.isnan().all(1) & ~found.failed.any(1)).sum())
    if none and not has_said:
        names = ", ".join(reward.name for reward in rewards)
        logger.warning(
            f"{none} of {len(found.values)} samples got no reward: {names} gave None for them, so nothing is learned from "
            "them. A function gives None where it does not apply; one of them should. This is said once."
        )
    return has_said or none > 0


def make_rewards(
    reward_funcs: Any, *, weights: Sequence[float] | None = None, processing_classes: Any = None
) -> list[Reward]:
    """Reward functions from what a trainer is given: one or several of a callable, a reward model, or the name of one.

    The name of a classifier with several named labels is a `ClassifierReward` of the one that is called positive.
    `processing_classes` are tokenizers of the reward models, None for those loaded by name. Raises ConfigError where
    numbers of functions, weights and tokenizers differ, or something is no function.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not functions or functions == [None]:
        raise ConfigError("reward_funcs is missing: give a function (prompts, completions, **columns) -> rewards.")
    models = [function for function in functions if isinstance(function, str | nn.Module)]
    if processing_classes is not None and not isinstance(processing_classes, list | tuple) and len(models) > 1:
        raise ConfigError(
            f"reward_processing_classes is one tokenizer for {len(models)} reward models, which may have one each: give a list, "
            "with None for functions and for models that are loaded by name."
        )
    tokenizers = _one_each("reward_processing_classes", processing_classes, functions)
    made = [_function(f, tokenizer) for f, tokenizer in zip(functions, tokenizers, strict=True)]
    numbers = [1.0] * len(made) if weights is None else _one_each("reward_weights", list(weights), functions)
    return [Reward(name, f, float(w)) for name, f, w in zip(_names(made), made, numbers, strict=True)]


def check_weights(reward_funcs: Any, weights: Sequence[float] | None) -> None:
    """Raises ConfigError where `reward_weights` are not one for each function; nothing is loaded."""
    if reward_funcs is not None and weights is not None:
        functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        _one_each("reward_weights", list(weights), functions)


def check_columns(rewards: Sequence[Reward], columns: Sequence[str]) -> None:
    """Raise ConfigError for a function that asks for something else than the dataset's `columns`; say which are hidden."""
    say_hidden(columns)
    for reward in rewards:
        check_arguments(reward.name, reward.function, columns)


def _one_each(argument: str, values: Any, functions: Sequence[Any]) -> list[Any]:
    values = list(values) if isinstance(values, list | tuple) else [values] * len(functions)
    if len(values) != len(functions):
        raise ConfigError(
            f"{argument} has {counted(len(values), 'value')} for {counted(len(functions), 'reward function')}: give one each."
        )
    return values


def _function(given: Any, tokenizer: Any) -> RewardFunction:
    if isinstance(given, str):
        with explain_missing(given, f"reward_funcs={given!r}"):
            labels = PreTrainedConfig.get_config_dict(given)[0].get("id2label", ())
            return ClassifierReward(given, tokenizer) if len(labels) > 1 else RewardModel(given, tokenizer)
    if isinstance(given, nn.Module):
        return RewardModel(given, tokenizer)
    if not callable(given):
        raise ConfigError(f"reward_funcs holds a {type(given).__name__}: give a function, a reward model or its name.")
    return given


def _names(functions: Sequence[RewardFunction]) -> list[str]:
    """Names in logs, each once: a second `short` is `short_2`."""
    named = [function.func if isinstance(function, functools.partial) else function for function in functions]
    names = [getattr(function, "__name__", type(function).__name__) for function in named]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)]


def call_rewards(
    rewards: Sequence[Reward], samples: Samples, *, timeout: float | None = None, on_error: str | None = None
) -> Rewarded:
    """Rewards of `samples` by every function. `timeout` is in seconds, per call.

    Raises RewardError, with function and sample, unless `on_error` is "drop"; None: the caller can only stop.
    """
    if on_error is not None and on_error not in ON_ERROR:
        raise ConfigError(unknown("on_reward_error", on_error, ON_ERROR))
    outcomes = _outcomes(rewards, samples, timeout)
    columns = [_column(r, o, samples, timeout, on_error) for r, o in zip(rewards, outcomes, strict=True)]
    values = torch.tensor([[math.nan if v is None else v for v in values] for values, _ in columns]).T
    failed = torch.tensor([failed for _, failed in columns], dtype=torch.bool).T
    return Rewarded(values.float().reshape(len(samples), len(rewards)), failed.reshape(len(samples), len(rewards)))


Outcome = Sequence[float | None] | BaseException


def _outcomes(rewards: Sequence[Reward], samples: Samples, timeout: float | None) -> list[Outcome]:
    """What each function gave, or raised; the async ones run at the same time."""
    found: dict[int, Outcome] = {}
    waiting = [i for i, reward in enumerate(rewards) if reward.is_async]
    if waiting:
        asynchronous = [rewards[i] for i in waiting]
        run = _all_async if timeout is None else functools.partial(_all_begun, timeout=timeout)
        found.update(zip(waiting, run(asynchronous, samples), strict=True))
    for i, reward in enumerate(rewards):
        if i not in found:
            (found[i],) = _all_begun([reward], samples, timeout)
    return [found[i] for i in range(len(rewards))]


def _caught(function: Callable[[], Any]) -> Outcome:
    """What a user's function gives or raises, SystemExit included; a signal that ends the program is none of its doing."""
    try:
        with _signals_known():
            return function()
    except BaseException as error:
        if _is_from_signal(error):
            raise
        return error


@contextmanager
def _signals_known() -> Iterator[None]:
    """Ctrl-C raises from a function of ours meanwhile, to be told from a function that raises KeyboardInterrupt itself."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _is_from_signal(error: BaseException) -> bool:
    """Whether a handler of signals raised it."""
    if isinstance(error, Exception):
        return False
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(h, "__func__", h), "__code__", None) for h in [*handlers, _interrupt]} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _all_begun(rewards: Sequence[Reward], samples: Samples, timeout: float | None) -> list[Outcome]:
    """What functions give that all begin before one is waited for."""
    begun = [_caught(lambda reward=reward: reward.begin(samples, timeout)) for reward in rewards]
    return [wait if isinstance(wait, BaseException) else _caught(wait) for wait in begun]


def _in_thread(function: Callable[[], Any], timeout: float | None) -> Any:
    """The result of a function that may take `timeout` seconds. Beyond, its thread is abandoned."""
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((function(), None))
        except BaseException as error:  # handed to the thread that waits
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not done:
        raise TimeoutError
    result, error = done[0]
    if error is not None:
        raise error
    return result


def _all_async(rewards: Sequence[Reward], samples: Samples) -> list[Outcome]:
    """In a thread of its own, since a notebook has a loop running already."""

    async def call(reward: Reward) -> Outcome:
        try:
            return await reward.function(**reward.keywords(samples))
        except BaseException as error:  # SystemExit would end the loop, and the others with it
            return error

    async def run() -> list[Outcome]:
        return await asyncio.gather(*map(call, rewards))

    return _in_thread(lambda: asyncio.run(run()), None)


@dataclass(frozen=True)
class Failure:
    """What a function did wrong with a sample."""

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
            others = ", or set on_reward_error='drop' to learn from the other samples" if on_error == "stop" else ""
            raise RewardError(f"{what} Mend the function{others}.") from failure.cause
        reward.say_dropped(what)
    values = [None if i in failures else each for i, each in enumerate(judged)]
    return values, [i in failures for i in range(len(samples))]


def _judged(outcome: Any, count: int) -> list[float | Failure | None]:
    """The rewards of `count` samples, or what is wrong with them."""
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
    """Rewards and failures of samples on their own, after the function has failed with all; all fail where none does alone.

    A sample that takes all its time, or ends its process, costs much: the first is enough to stop for, and of those that
    can be dropped, samples after the third are not tried.
    """
    judged: list[float | Failure | None] = []
    costly = 0
    while len(judged) < len(samples) and costly < (1 if stops else MOST_COSTLY):
        (alone,) = _outcomes([reward], samples.one(len(judged)), timeout)
        costly += isinstance(alone, TimeoutError | ProcessEnded)
        judged += [Failure(_reason(alone, timeout), alone)] if isinstance(alone, BaseException) else _judged(alone, 1)
    judged += [None if stops else Failure("was not tried after others")] * (len(samples) - len(judged))
    if any(isinstance(each, Failure) for each in judged):
        return judged
    return [Failure(_reason(error, timeout), error)] * len(samples)


def _is_list(outcome: Any) -> bool:
    """Whether there is one value after another; a tensor may have no dimension, and a text or mapping means no numbers."""
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
    """What is wrong with one reward; empty if nothing is."""
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
