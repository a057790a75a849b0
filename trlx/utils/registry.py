"""Registry of classes by case-insensitive name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from trl.errors import ConfigError, unknown


class Registry:
    """Classes of one `kind`, by name. `at_home` maps built-in names to modules, which are imported on first use."""

    def __init__(self, kind: str, at_home: Mapping[str, str] | None = None) -> None:
        self.kind, self.at_home = kind, {name.lower(): (name, module) for name, module in (at_home or {}).items()}
        self.classes: dict[str, tuple[str, type]] = {}

    def register(self, name: Any = None) -> Any:
        """Register a class under its own name, or return a decorator that registers one under `name`."""
        if isinstance(name, type):
            return self._add(name.__name__, name)
        return lambda cls: self._add(name or cls.__name__, cls)

    def _add(self, name: str, cls: type) -> type:
        self.classes[name.lower()] = (name, cls)
        return cls

    def get(self, name: str) -> Any:
        """The class registered as `name`. Raises ConfigError, which lists the known names, for an unknown one."""
        key = str(name).lower()
        if key not in self.classes and key in self.at_home:
            importlib.import_module(self.at_home[key][1])
        if key not in self.classes:
            raise ConfigError(unknown(self.kind, str(name), self.names))
        return self.classes[key][1]

    @property
    def names(self) -> list[str]:
        """All registered names, in their original case."""
        return sorted({key: name for key, (name, _) in [*self.at_home.items(), *self.classes.items()]}.values())
