"""Reward functions for the form of completions: tags, length, repetition, patterns, JSON.

A function takes arguments of the trainer by name, and returns one number per completion. Functions with options are made by
`get_…` classes, whose objects can be pickled. The docstrings give the ranges of rewards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from trl.errors import ConfigError, unknown
from trl.rewards.answers import Completion, text_of
from trl.rewards.signature import fitting

THINKS = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)


def think_format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 if a completion begins with reasoning in a single pair of <think> tags, else 0."""
    return [float(THINKS.fullmatch(text_of(completion)) is not None) for completion in completions]


def think_tags_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """The share of the tags `<think>` and `</think>` that occur exactly once in a completion: 0, ½ or 1."""
    texts = map(text_of, completions)
    return [sum(text.count(tag) == 1 for tag in ("<think>", "</think>")) / 2 for text in texts]


def boxed_format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 if a completion has exactly one \\boxed{…}, else 0."""
    return [float(text_of(completion).count("\\boxed{") == 1) for completion in completions]


@dataclass(frozen=True)
class get_soft_overlong_punishment:
    """0 up to `max_completion_len − soft_punish_cache` tokens, then decreasing linearly to −1 at `max_completion_len`.

    DAPO, arXiv:2503.14476, Eq. 13.
    """

    max_completion_len: int
    soft_punish_cache: int

    __name__ = "soft_overlong_punishment_reward"

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        free = self.max_completion_len - self.soft_punish_cache
        return [self._of(len(ids) - free, len(ids)) for ids in completion_ids]

    def _of(self, excess: int, length: int) -> float:
        if excess <= 0:
            return 0.0
        return -1.0 if length > self.max_completion_len else -excess / self.soft_punish_cache


@dataclass(frozen=True)
class get_length_reward:
    """−|length − target| / target, at least −1; highest for completions of `target` tokens (arXiv:2503.04697)."""

    target: int

    __name__ = "length_reward"

    def __post_init__(self) -> None:
        _check_positive("target", self.target)

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-min(abs(len(ids) - self.target) / self.target, 1.0) for ids in completion_ids]


@dataclass(frozen=True)
class get_repetition_penalty_reward:
    """`max_penalty` (≤ 0) times the share of token n-grams that are repetitions (arXiv:2502.03373, appendix C.2)."""

    ngram_size: int = 3
    max_penalty: float = -1.0

    __name__ = "repetition_penalty_reward"

    def __post_init__(self) -> None:
        if self.max_penalty > 0:
            raise ConfigError(f"max_penalty={self.max_penalty} would reward repetition: give 0 or less.")
        _check_positive("ngram_size", self.ngram_size)

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self._of(ids) for ids in completion_ids]

    def _of(self, ids: Sequence[int]) -> float:
        count = len(ids) - self.ngram_size + 1
        different = {tuple(ids[i : i + self.ngram_size]) for i in range(count)}
        return self.max_penalty * (1 - len(different) / count) if count > 0 else 0.0


@dataclass(frozen=True)
class get_regex_reward:
    """1 if the pattern matches the whole completion (with `search`, any part of it), else 0. A dot matches line ends too."""

    pattern: str
    search: bool = False

    __name__ = "regex_reward"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern={self.pattern!r} is not a valid regular expression: {error}.") from error

    def __call__(self, completions: Sequence[Completion], **_: Any) -> list[float]:
        compiled = re.compile(self.pattern, re.DOTALL)
        match = compiled.search if self.search else compiled.fullmatch
        return [float(match(text_of(completion)) is not None) for completion in completions]


@dataclass(frozen=True)
class get_json_reward:
    """1 if a completion is JSON that conforms to `schema`, `partial` if it is other JSON, 0 if it is not JSON.

    A fence of ``` around the JSON is ignored. `schema` is a JSON Schema (2020-12), checked by `jsonschema`.
    """

    schema: Mapping[str, Any] | None = None
    partial: float = 0.0

    __name__ = "json_reward"

    def __post_init__(self) -> None:
        validator_of(self.schema or {})

    def __call__(self, completions: Sequence[Completion], **_: Any) -> list[float]:
        validator = validator_of(self.schema or {})
        return [self._of(text_of(completion), validator) for completion in completions]

    def _of(self, text: str, validator: Validator) -> float:
        try:
            value = json.loads(_unfenced(text), parse_constant=_refuse)
        except (ValueError, RecursionError):  # not JSON, or nested too deeply for Python's parser
            return 0.0
        try:
            return 1.0 if validator.is_valid(value) else self.partial
        except RecursionError:
            return self.partial


def _unfenced(text: str) -> str:
    """The text without a fence of ``` around the whole of it."""
    inner = text.strip().removeprefix("```").removesuffix("```")
    return inner.removeprefix("json") if len(inner) == len(text.strip()) - 6 else text


def _refuse(constant: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python's parser accepts although they are not JSON."""
    raise ValueError(f"{constant} is not JSON.")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value}: give a number of tokens, at least 1.")


STRICT = Draft202012Validator(
    {
        "$id": "urn:trl:strict",
        "$dynamicAnchor": "meta",
        "$ref": Draft202012Validator.META_SCHEMA["$id"],
        "properties": {"dependencies": False},  # a keyword of earlier drafts, which would have no effect
        "unevaluatedProperties": False,
    },
    format_checker=Draft202012Validator.FORMAT_CHECKER,
)
"""Validates schemas; unlike the usual meta-schema it rejects unknown keywords at any depth, which would be ignored."""


def validator_of(schema: Mapping[str, Any]) -> Validator:
    """A validator for a schema (JSON Schema 2020-12). Raises ConfigError for an invalid schema or an unknown keyword."""
    for error in sorted(STRICT.iter_errors(schema), key=lambda error: -len(error.path)):  # the innermost is the cause
        if error.validator == "unevaluatedProperties":
            name = next(name for name in error.instance if repr(name) in error.message)
            raise ConfigError(unknown("keyword of the JSON schema", name, Draft202012Validator.VALIDATORS))
        raise ConfigError(f"Invalid JSON schema: {'.'.join(map(str, error.path)) or 'the schema'}: {error.message}.")
    try:
        validator = Draft202012Validator(
            schema, registry=Registry()
        )  # an empty registry loads nothing from the network
        for value in (None, {}, [], "", 0):
            validator.is_valid(value)
    except (Unresolvable, RecursionError) as error:
        raise ConfigError(
            f"The JSON schema has a reference that is not in it, or an endless one to itself: {error}."
        ) from error
    return validator


COMBINATIONS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "sum": lambda rewards, weights: sum(r * w for r, w in zip(rewards, weights, strict=True)),
    "product": lambda rewards, weights: math.prod(rewards),
    "min": lambda rewards, weights: min(rewards),
}


@dataclass(frozen=True)
class get_combined_reward:
    """One reward from several functions: their weighted "sum", "product" (each acts as a condition), or "min".

    Functions that do not apply (None) are left out; the reward is None if none applies. Functions must not be async.
    """

    functions: Sequence[Callable[..., Sequence[float | None]]]
    how: str = "sum"
    weights: Sequence[float] | None = None

    __name__ = "combined_reward"

    def __post_init__(self) -> None:
        if self.how not in COMBINATIONS:
            raise ConfigError(unknown("how", self.how, COMBINATIONS))
        if self.weights is not None and (self.how != "sum" or len(self.weights) != len(self.functions)):
            raise ConfigError("weights are for how='sum': give one for each function.")

    def __call__(self, **given: Any) -> list[float | None]:
        rewards = [function(**fitting(function, given)) for function in self.functions]
        weights = self.weights or [1.0] * len(rewards)
        return [self._of(each, weights) for each in zip(*rewards, strict=True)]

    def _of(self, rewards: Sequence[float | None], weights: Sequence[float]) -> float | None:
        known = [(r, w) for r, w in zip(rewards, weights, strict=True) if r is not None]
        return float(COMBINATIONS[self.how](*zip(*known, strict=True))) if known else None
