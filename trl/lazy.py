"""Lazy imports of public names. The stub `__init__.pyi` of a package says which module each name comes from."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any


def modules_of(file: str) -> dict[str, str]:
    """Map public names to their modules, as the stub beside `file`, a package's `__init__.py`, declares them."""
    stub = Path(file).with_suffix(".pyi").read_text(encoding="utf-8")
    return {name: module for module, name in re.findall(r"^from (\S+) import (\w+)", stub, re.MULTILINE)}


def load(package: str, name: str, module: str) -> Any:
    """Import a public name from its module, and cache it as an attribute of the package."""
    value = getattr(importlib.import_module(module), name)
    setattr(sys.modules[package], name, value)
    return value
