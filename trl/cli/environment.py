"""`trl env`: versions and hardware as plain text, ready to be pasted into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

from trl import __version__
from trl.errors import ConfigError

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "vllm",
    "deepspeed",
    "liger-kernel",
    "bitsandbytes",
    "torchao",
    "diffusers",
    "flash-attn",
)


def run(words: Sequence[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print("Usage  trl env\n\nPrint versions and hardware, for bug reports.")
        return 0
    if words:
        raise ConfigError(f"trl env takes no options, but was given {words[0]!r}.")
    facts = {"trl": __version__, **_machine(), **_versions(), **_accelerators()}
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return 0


def _machine() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {cores} cores",
    }


def _versions() -> dict[str, str]:
    installed = {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
    return {name: installed.get(name, "not installed") for name in PACKAGES}


def _accelerators() -> dict[str, str]:
    import torch

    if not torch.accelerator.is_available():
        return {"accelerator": "none"}
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":
        return {"accelerator": f"{torch.accelerator.device_count()} × {kind}"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts = {f"cuda:{i}": f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for i, each in enumerate(devices)}
    return {"cuda": str(torch.version.cuda), **facts}
