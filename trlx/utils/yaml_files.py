"""YAML as people write it: `1e-5` is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from trl.errors import ConfigError

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
"""Numbers with an exponent that YAML 1.1 takes for text, as it asks for a point and a sign."""


class _Loader(yaml.SafeLoader):
    """Reads plain values alone."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file. Raises ConfigError if there is none, with file and place."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"There is no file {str(path)!r}.")
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} holds a {type(data).__name__}: a configuration is a mapping of sections.")
    return data
