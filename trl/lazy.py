"""Public names of packages that load on first use. The stub beside a package's `__init__.py` says where each comes from."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any


def modules_of(file: str) -> dict[str, str]:
    """Public names of the package whose `__init__.py` this is, and their modules, as type checkers read them."""
    stub = Path(file).with_suffix(".pyi").read_text(encoding="utf-8")
    return {name: module for module, name in re.findall(r"^from (\S+) import (\w+)", stub, re.MULTILINE)}


def load(package: str, name: str, module: str) -> Any:
    """The value of a public name, which the package has from now on."""
    value = getattr(importlib.import_module(module), name)
    setattr(sys.modules[package], name, value)
    return value
