"""Optional dependencies: which extra of `trl` installs each, and checks whether it is there."""

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
    """True if a module of that name can be imported."""
    return importlib.util.find_spec(module) is not None


def is_installed(package: str) -> bool:
    """True if a distribution of that name is installed; its modules may have other names."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def require(module: str, *, to: str) -> ModuleType:
    """Import an optional module, which `to` needs, or raise an error that says how to install it.

    Raises ImportError: `4-bit loading needs bitsandbytes: pip install "trl[quantization]".`
    """
    if not is_available(module):
        raise ImportError(f'{to} needs {module}: pip install "trl[{EXTRAS[module]}]".')
    return importlib.import_module(module)
