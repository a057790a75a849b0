"""Reward functions with their names and weights, made from a trainer's arguments, and the samples that they rate.

    reward(prompts=[…], completions=[…], completion_ids=[…], **columns) -> [1.0, None, …]

`trl.rewards.call` calls them.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from trl.counts import counted
from trl.errors import ConfigError
from trl.models.not_found import explain_missing
from trl.rewards.classifier import ClassifierReward
from trl.rewards.model import RewardModel
from trl.rewards.signature import check_arguments, fitting, say_hidden
from trl.rewards.worker import Worker, WorkerError

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., "Sequence[float | None] | Awaitable[Sequence[float | None]]"]


@dataclass(frozen=True)
class Reward:
    """A reward function, its name in logs, and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    said: set[str] = field(default_factory=set, compare=False, repr=False)
    """Subjects that have been warned about, which is done once."""

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__)

    def keywords(self, samples: Samples) -> dict[str, Any]:
        """The arguments of the function, from the samples."""
        return fitting(self.function, samples.keywords)

    @functools.cached_property
    def worker(self) -> Worker | None:
        """The function's own process; None if the function has to stay in this one, which is logged."""
        if getattr(self.function, "runs_in_trainer", False):
            return None
        try:
            return Worker(self.function)
        except WorkerError as error:
            self.stay(error)
            return None

    def stay(self, error: WorkerError) -> None:
        """Keep the function in this process from now on."""
        vars(self)["worker"] = None
        logger.warning(
            f"Reward function {self.name!r} runs in the trainer's process, where reward_timeout cannot stop code that never "
            f"yields: {error}. A function from an importable module can run in its own process."
        )

    def warn_once(self, subject: str, message: str) -> None:
        """Log a warning, unless there has been one about the same `subject`."""
        if subject not in self.said:
            self.said.add(subject)
            logger.warning(f"{message} This is logged once.")


@dataclass(frozen=True)
class Samples:
    """Samples to be rewarded. `columns` hold one value per sample; `extras` are passed unchanged to every call."""

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
        """All arguments for functions by name. Prompts and completions override columns with the same names."""
        return {**self.columns, "prompts": self.prompts, "completions": self.completions, **self.extras}


def make_rewards(
    reward_funcs: Any, *, weights: Sequence[float] | None = None, processing_classes: Any = None
) -> list[Reward]:
    """Make reward functions from a trainer's arguments: one or several callables, reward models, or names of reward models.

    The name of a classifier with several labels becomes a `ClassifierReward` for the label that is called positive.
    `processing_classes` are the tokenizers of reward models, None for those loaded by name. Raises ConfigError if the
    numbers of functions, weights and tokenizers differ, or something is not a function.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not functions or functions == [None]:
        raise ConfigError("reward_funcs is missing: give a function (prompts, completions, **columns) -> rewards.")
    models = [function for function in functions if isinstance(function, str | nn.Module)]
    if processing_classes is not None and not isinstance(processing_classes, list | tuple) and len(models) > 1:
        raise ConfigError(
            f"reward_processing_classes is one tokenizer, but there are {len(models)} reward models: give a list with one for "
            "each, and None for functions and for models that are loaded by name."
        )
    tokenizers = _one_each("reward_processing_classes", processing_classes, functions)
    made = [_function(f, tokenizer) for f, tokenizer in zip(functions, tokenizers, strict=True)]
    numbers = [1.0] * len(made) if weights is None else _one_each("reward_weights", list(weights), functions)
    return [Reward(name, f, float(w)) for name, f, w in zip(_names(made), made, numbers, strict=True)]


def check_weights(reward_funcs: Any, weights: Sequence[float] | None) -> None:
    """Raise ConfigError unless `reward_weights` has one number for each function; loads nothing."""
    if reward_funcs is not None and weights is not None:
        functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        _one_each("reward_weights", list(weights), functions)


def check_columns(rewards: Sequence[Reward], columns: Sequence[str]) -> None:
    """Raise ConfigError for a function with an argument that is not a column of the dataset; warn of hidden `columns`."""
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
    """Unique names for logs: a second `short` is called `short_2`."""
    named = [function.func if isinstance(function, functools.partial) else function for function in functions]
    names = [getattr(function, "__name__", type(function).__name__) for function in named]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)]
