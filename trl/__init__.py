"""Fine-tune and align language models: one road from rows to loss. Public names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "2.0.0.dev0"

_PUBLIC = {
    "types": ["Batch", "Completion", "Example", "Scores"],
    "trainers.config": ["TrainerConfig"],
    "trainers.base": ["BaseTrainer"],
    "trainers.sft": ["SFTConfig", "SFTTrainer"],
    "models.score": ["score"],
    "data.layout": ["lay_out"],
    "errors": ["ConfigError", "DataError", "ModelError", "TrlError"],
}

_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        from trl.errors import suggest

        raise AttributeError(f"module 'trl' has no attribute {name!r}.{suggest(name, _MODULE_OF)}")
    value = getattr(importlib.import_module(f"trl.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
