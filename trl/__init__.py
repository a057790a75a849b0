"""Fine-tune and align language, vision-language and diffusion models. Public names are imported on first use."""

from __future__ import annotations

import sys
from typing import Any

from trl.compat.names import CLASSIC, LegacyImportFinder, missing
from trl.lazy import load, modules_of

__version__ = "2.0.0.dev0"

_MODULE_OF = modules_of(__file__)

__all__ = sorted(_MODULE_OF)
sys.meta_path.append(LegacyImportFinder())


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name) or ("trl.classic" if name in CLASSIC else "")
    if not module:
        raise missing("trl", name)
    return load(__name__, name, module)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
