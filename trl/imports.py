"""Optional dependencies, in one place."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

EXTRAS = {
    "vllm": "vllm",
    "deepspeed": "deepspeed",
    "liger_kernel": "liger",
    "bitsandbytes": "quantization",
    "torchao": "quantization",
    "diffusers": "diffusion",
    "math_verify": "math",
    "ray": "sweep",
    "lm_eval": "benchmarks",
    "starlette": "serve",
    "uvicorn": "serve",
}


def is_available(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def require(module: str, *, to: str) -> ModuleType:
    """Import an optional module, or say in one sentence how to get it.

    Raises ImportError: `4-bit loading needs bitsandbytes: pip install "trl[quantization]".`
    """
    if not is_available(module):
        raise ImportError(f'{to} needs {module}: pip install "trl[{EXTRAS[module]}]".')
    return importlib.import_module(module)
