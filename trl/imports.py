"""Optional dependencies, in one place."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

EXTRAS = {
    "vllm": "vllm",
    "deepspeed": "deepspeed",
    "liger_kernel": "liger",
    "bitsandbytes": "quantization",
    "diffusers": "diffusion",
    "math_verify": "math",
    "ray": "sweep",
    "lm_eval": "benchmarks",
    "starlette": "serve",
    "uvicorn": "serve",
}


def is_available(module: str) -> bool:
    """Whether there is a module of that name."""
    return importlib.util.find_spec(module) is not None


def is_installed(package: str) -> bool:
    """Whether a package of that name is installed, whatever its modules are called."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def require(module: str, *, to: str) -> ModuleType:
    """Import an optional module, or say in one sentence how to get it.

    Raises ImportError: `4-bit loading needs bitsandbytes: pip install "trl[quantization]".`
    """
    if not is_available(module):
        raise ImportError(f'{to} needs {module}: pip install "trl[{EXTRAS[module]}]".')
    return importlib.import_module(module)
