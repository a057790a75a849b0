"""Fine-tune and align language models: one road from rows to loss. Public names load on first use."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from trl.compat import LegacyImportFinder, missing

__version__ = "2.0.0.dev0"

_STUB = Path(__file__).with_suffix(".pyi")
_MODULE_OF = {name: module for module, name in re.findall(r"^from (\S+) import (\w+)", _STUB.read_text(), re.MULTILINE)}
"""Public names and their modules, as type checkers read them."""

__all__ = sorted(_MODULE_OF)
sys.meta_path.append(LegacyImportFinder())


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise missing("trl", name)
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
