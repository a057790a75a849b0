"""Optional dependencies: how each is installed, and checks whether it is there."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from trl.errors import MissingPackageError

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
"""Module → the extra of `trl` that installs it."""

PACKAGES = {"lomo_optim": "lomo-optim", "optimi": "torch-optimi"}
"""Module → its package, where the name is another."""


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


def pip_command(module: str) -> str:
    """The command that installs a module: `pip install "trl[quantization]"`."""
    return f'pip install "trl[{EXTRAS[module]}]"' if module in EXTRAS else f"pip install {PACKAGES.get(module, module)}"


def check_available(module: str, *, to: str) -> None:
    """Raise an error that says how to install an optional module which `to` needs, if it is missing. Imports nothing.

    Raises MissingPackageError: `load_in_4bit needs bitsandbytes: pip install "trl[quantization]".`
    """
    if not is_available(module):
        raise MissingPackageError(f"{to} needs {module}: {pip_command(module)}.")


def require(module: str, *, to: str) -> ModuleType:
    """Import an optional module, which `to` needs. Raises MissingPackageError as `check_available` does."""
    check_available(module, to=to)
    return importlib.import_module(module)
