"""Decoder layers compiled one by one, with lengths that may change: one graph for all of them.

Compiling a whole model takes minutes, and begins anew where a head or an adapter is patched. Layers are alike, so that the
graph of the first serves all; what is around them stays as it is. The length of rows is dynamic from the start.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from trl.errors import ConfigError


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that the architecture says are not to be split between devices: those that it repeats."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: PreTrainedModel, *, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile the layers of `model` in place, when they are first run; how many there are.

    Raises ConfigError for an architecture that does not say what its layers are.
    """
    layers = repeated_layers(model)
    if not layers:
        raise ConfigError(f"torch_compile: {type(model).__name__} does not say what its layers are: leave it out.")
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    return len(layers)
