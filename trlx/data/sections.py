"""Base class of configuration sections: conversion from and to dicts, with a check of all keys."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from trl.errors import ConfigError, suggest


class Section:
    """Mixin for dataclasses that convert from and to dicts."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Any:
        """Make the section from a dict. Raises ConfigError for unknown and for missing keys."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in config:
            if name not in fields:
                raise ConfigError(
                    f"{cls.__name__} has no parameter {name!r}.{suggest(name, fields)} It has: {', '.join(fields)}."
                )
        missing = [name for name, field in fields.items() if _is_required(field) and name not in config]
        if missing:
            raise ConfigError(f"{cls.__name__} needs {', '.join(map(repr, missing))}, which the configuration lacks.")
        return cls(**copy.deepcopy(dict(config)))

    def to_dict(self) -> dict[str, Any]:
        """Return all parameters by name, copied."""
        return {field.name: copy.deepcopy(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into a copy of `base`, recursively."""
    result = dict(copy.deepcopy(base))
    for name, value in changes.items():
        both_dicts = isinstance(result.get(name), Mapping) and isinstance(value, Mapping)
        result[name] = merged(result[name], value) if both_dicts else copy.deepcopy(value)
    return result


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Expand dotted keys: `{"a.b": 1, "a": {"c": 2}}` becomes `{"a": {"b": 1, "c": 2}}`."""
    result: dict[str, Any] = {}
    for path, value in changes.items():
        *sections, name = str(path).split(".")
        piece: dict[str, Any] = {name: value}
        for section in reversed(sections):
            piece = {section: piece}
        result = merged(result, piece)
    return result
