"""What the sections of a configuration have in common: dicts in and out, and no key that is not theirs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from trl.errors import ConfigError, suggest


class Section:
    """A dataclass that is made from a dict, and becomes one."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Any:
        """The section that `config` describes. Raises ConfigError for a key that it has not, or lacks."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in config:
            if name not in fields:
                raise ConfigError(
                    f"{cls.__name__} has no parameter {name!r}.{suggest(name, fields)} It has: {', '.join(fields)}."
                )
        missing = [name for name, field in fields.items() if _is_required(field) and name not in config]
        if missing:
            raise ConfigError(
                f"{cls.__name__} needs {', '.join(map(repr, missing))}, and the configuration does not say it."
            )
        return cls(**copy.deepcopy(dict(config)))

    def to_dict(self) -> dict[str, Any]:
        """All parameters by name, copied."""
        return {field.name: copy.deepcopy(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, dict by dict."""
    result = dict(copy.deepcopy(base))
    for name, value in changes.items():
        both_dicts = isinstance(result.get(name), Mapping) and isinstance(value, Mapping)
        result[name] = merged(result[name], value) if both_dicts else copy.deepcopy(value)
    return result


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1, "a": {"c": 2}}` as `{"a": {"b": 1, "c": 2}}`."""
    result: dict[str, Any] = {}
    for path, value in changes.items():
        *sections, name = str(path).split(".")
        piece: dict[str, Any] = {name: value}
        for section in reversed(sections):
            piece = {section: piece}
        result = merged(result, piece)
    return result
