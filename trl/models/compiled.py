"""Compile decoder layers one by one with `torch.compile`, with dynamic sequence length.

Compiling a whole model takes minutes, and is repeated when a head or an adapter is patched. The layers of a model have the
same code, so that the compiled graph of the first serves all; the modules around them run eagerly.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from trl.errors import ConfigError


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of an architecture: those in `_no_split_modules`, which must not be split between devices."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: PreTrainedModel, *, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile the layers of `model` in place (compilation happens in their first forward); return how many there are.

    Raises ConfigError for an architecture that does not declare its layers in `_no_split_modules`.
    """
    layers = repeated_layers(model)
    if not layers:
        raise ConfigError(
            f"torch_compile: {type(model).__name__} does not declare its layers (_no_split_modules): leave torch_compile out."
        )
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    return len(layers)
