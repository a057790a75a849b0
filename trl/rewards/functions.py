"""Reward functions about the form of completions: tags, length, repetition, patterns, JSON.

A function takes what the trainer hands it by name and gives one number per completion. What has options is made by a
`get_…`, an object that can be pickled. Each says its range.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.errors import ConfigError, unknown
from trl.rewards.answers import Completion, text_of
from trl.rewards.signature import fitting

THINKS = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*", re.DOTALL)


def think_format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 where a completion begins with reasoning in one pair of <think> tags, else 0."""
    return [float(THINKS.fullmatch(text_of(completion)) is not None) for completion in completions]


def think_tags_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """The share of `<think>`, `</think>` that stand in a completion exactly once: 0, ½ or 1."""
    texts = map(text_of, completions)
    return [sum(text.count(tag) == 1 for tag in ("<think>", "</think>")) / 2 for text in texts]


def boxed_format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 where a completion has exactly one \\boxed{…}, else 0."""
    return [float(text_of(completion).count("\\boxed{") == 1) for completion in completions]


@dataclass(frozen=True)
class get_soft_overlong_punishment:
    """0 up to `max_completion_len − soft_punish_cache` tokens, from there falling linearly to −1 at the limit.

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
    """−|length − target| / target, not below −1: completions of `target` tokens are best (arXiv:2503.04697)."""

    target: int

    __name__ = "length_reward"

    def __post_init__(self) -> None:
        _check_positive("target", self.target)

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-min(abs(len(ids) - self.target) / self.target, 1.0) for ids in completion_ids]


@dataclass(frozen=True)
class get_repetition_penalty_reward:
    """`max_penalty` (≤ 0) times the share of n-grams of tokens that were there before (arXiv:2502.03373, appendix C.2)."""

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
    """1 where the pattern fits the whole completion (anywhere in it, with `search`), else 0. A dot fits line ends too."""

    pattern: str
    search: bool = False

    __name__ = "regex_reward"

    def __post_init__(self) -> None:
        _check_pattern(self.pattern)

    def __call__(self, completions: Sequence[Completion], **_: Any) -> list[float]:
        compiled = re.compile(self.pattern, re.DOTALL)
        match = compiled.search if self.search else compiled.fullmatch
        return [float(match(text_of(completion)) is not None) for completion in completions]


@dataclass(frozen=True)
class get_json_reward:
    """1 where a completion is JSON that conforms to `schema`, `partial` where it is other JSON, 0 where it is none.

    A fence of ``` around it is no part of it. Of JSON schema: type, enum, const, required, properties,
    additionalProperties, items, minItems, maxItems, minimum, maximum, minLength, maxLength, pattern, anyOf.
    """

    schema: Mapping[str, Any] | None = None
    partial: float = 0.0

    __name__ = "json_reward"

    def __post_init__(self) -> None:
        check_schema(self.schema or {})

    def __call__(self, completions: Sequence[Completion], **_: Any) -> list[float]:
        return [self._of(text_of(completion)) for completion in completions]

    def _of(self, text: str) -> float:
        fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", text, re.DOTALL)
        try:
            value = json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
        except (ValueError, RecursionError):  # nested deeper than Python's parser goes
            return 0.0
        return 1.0 if conforms(value, self.schema or {}) else self.partial


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python's parser reads, are no JSON."""
    raise ValueError(f"{constant} is not JSON.")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name}={value}: give a number of tokens, at least 1.")


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}.") from error


TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: TYPES["number"](v) and (isinstance(v, int) or v.is_integer()),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
}


def _types(value: Any, names: str | list[str]) -> bool:
    return any(TYPES[name](value) for name in _names(names))


def _names(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _properties(value: Any, schemas: Mapping[str, Any]) -> bool:
    return not isinstance(value, dict) or all(conforms(value[k], s) for k, s in schemas.items() if k in value)


def _same(value: Any, expected: Any) -> bool:
    """Python takes true for 1, JSON does not."""
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _is_number(value: Any) -> bool:
    return TYPES["number"](value)


RULES: dict[str, Callable[[Any, Any], bool]] = {
    "type": _types,
    "enum": lambda v, allowed: any(_same(v, each) for each in allowed),
    "const": _same,
    "required": lambda v, names: not isinstance(v, dict) or all(name in v for name in names),
    "properties": _properties,
    "items": lambda v, schema: not isinstance(v, list) or all(conforms(each, schema) for each in v),
    "minItems": lambda v, n: not isinstance(v, list) or len(v) >= n,
    "maxItems": lambda v, n: not isinstance(v, list) or len(v) <= n,
    "minimum": lambda v, low: not _is_number(v) or v >= low,
    "maximum": lambda v, high: not _is_number(v) or v <= high,
    "minLength": lambda v, n: not isinstance(v, str) or len(v) >= n,
    "maxLength": lambda v, n: not isinstance(v, str) or len(v) <= n,
    "pattern": lambda v, pattern: not isinstance(v, str) or re.search(pattern, v) is not None,
    "anyOf": lambda v, schemas: any(conforms(v, schema) for schema in schemas),
}
DESCRIPTIVE = ("title", "description", "default", "examples", "$schema", "additionalProperties")


def conforms(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value is as the schema says."""
    named = all(RULES[name](value, rule) for name, rule in schema.items() if name in RULES)
    return named and (not isinstance(value, dict) or _additional(value, schema))


def _additional(value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Whether the properties without a schema of their own are as `additionalProperties` says."""
    others = [v for k, v in value.items() if k not in schema.get("properties", {})]
    rule = schema.get("additionalProperties", True)
    return (rule or not others) if isinstance(rule, bool) else all(conforms(v, rule) for v in others)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise ConfigError for what would be ignored, or could not be checked."""
    if not isinstance(schema, Mapping):
        raise ConfigError(f"A JSON schema is a mapping of keywords to rules, but a part of this one is {schema!r}.")
    for name in schema:
        if name not in RULES and name not in DESCRIPTIVE:
            raise ConfigError(unknown("keyword of the JSON schema", name, [*RULES, *DESCRIPTIVE]))
    for name in _names(schema.get("type", ())):
        if name not in TYPES:
            raise ConfigError(unknown("type of the JSON schema", name, TYPES))
    if "pattern" in schema:
        _check_pattern(schema["pattern"])
    inside = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
    inside += [schema["items"]] if "items" in schema else []
    inside += [] if isinstance(schema.get("additionalProperties", True), bool) else [schema["additionalProperties"]]
    for each in inside:
        check_schema(each)


COMBINATIONS: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "sum": lambda rewards, weights: sum(r * w for r, w in zip(rewards, weights, strict=True)),
    "product": lambda rewards, weights: math.prod(rewards),
    "min": lambda rewards, weights: min(rewards),
}


@dataclass(frozen=True)
class get_combined_reward:
    """One reward of several functions: their weighted "sum", their "product" (each a condition), or the "min".

    Functions that do not apply (None) are left out; None where none applies. Functions may not be async.
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
