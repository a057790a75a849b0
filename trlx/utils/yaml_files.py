"""YAML as people write it: `1e-5` is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl.cli.parser import read_yaml as read_any
from trl.errors import ConfigError
from trl.sweep.numbers import with_numbers


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file. Raises ConfigError if there is none, with file and place."""
    data = read_any(str(path), "load_yaml")
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} holds a {type(data).__name__}: a configuration is a mapping of sections.")
    return with_numbers(data)
