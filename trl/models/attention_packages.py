"""Check that the package behind an `attn_implementation` is installed, before a model is loaded.

`transformers` uses the package itself, or a build that the package `kernels` downloads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl.errors import ConfigError, MissingPackageError, suggest
from trl.imports import is_installed

INSTALL = {
    "flash_attention_2": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash-attn-3", "build it from the folder hopper of github.com/Dao-AILab/flash-attention"),
    "flash_attention_4": ("flash-attn-4", "pip install flash-attn-4"),
}
"""Attention implementation → its package, and how to install it."""

ON_GPUS = frozenset({*INSTALL, "flex_attention"})
"""Implementations whose backward pass needs a GPU."""
KERNELS = "kernels"
ELSEWHERE = ("torch-npu", KERNELS)
"""Packages that bring flash attention themselves, in place of those in `INSTALL`."""


def check_attention_packages(asked: str | Mapping[str, str] | None) -> None:
    """Raises MissingPackageError for an `attn_implementation` whose package is not installed. Imports nothing."""
    for name in _names(asked):
        if name in INSTALL and not any(map(is_installed, (INSTALL[name][0], *ELSEWHERE))):
            package, how = INSTALL[name]
            raise MissingPackageError(
                f"attn_implementation={name!r} needs {package}, which is not installed: {how}; or `pip install {KERNELS}`, "
                "which downloads a build. Or leave attn_implementation out, for torch's own attention (sdpa)."
            )
        if "/" in name and not is_installed(KERNELS):
            raise MissingPackageError(
                f"attn_implementation={name!r} is a kernel of the hub, and needs {KERNELS}, which is not installed: "
                f"`pip install {KERNELS}`. Or leave attn_implementation out, for torch's own attention (sdpa)."
            )


def check_attention(asked: str | Mapping[str, str] | None) -> None:
    """As `check_attention_packages`; raises ConfigError also for an unknown name, or one that needs a GPU where there is none."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    check_attention_packages(asked)
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    for name in _names(asked):
        if "/" in name:
            continue
        if name not in known:
            plain = [each for each in known if "|" not in each]
            raise ConfigError(
                f"attn_implementation={name!r} is unknown.{suggest(name, known)} Known: {', '.join(plain)}."
            )
        if name in ON_GPUS and not torch.accelerator.is_available():
            raise ConfigError(
                f"attn_implementation={name!r} needs a GPU, and this machine has none: leave attn_implementation out, for "
                "torch's own attention (sdpa)."
            )


def _names(asked: Any) -> list[str]:
    """The names in an `attn_implementation`, which is one name, or a mapping with one for each part of a model."""
    given = [*asked.values()] if isinstance(asked, Mapping) else [asked]
    if wrong := [each for each in given if not isinstance(each, str | None)]:
        raise ConfigError(f"attn_implementation={wrong[0]!r}: give a name, such as 'sdpa'.")
    return [name.removeprefix("paged|") for name in given if isinstance(name, str)]
