"""Change a loaded model in place: patch a forward permanently, or replace forwards or the training mode within a context."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

from torch import nn
from transformers import PreTrainedConfig


def patch_forward(module: nn.Module, forward: Callable) -> None:
    """Replace the forward of a module by `forward(self, …)`; the original is kept as `self._trl_plain_forward`.

    A copy of the module is patched as well. An unpickled module has its original forward, and can be patched again.
    """
    module._trl_plain_forward = module.forward
    # A bound method is pickled by its name, and read back as the class's own method of that name.
    forward.__name__ = "forward"
    module.forward = MethodType(forward, module)


def is_patched(module: nn.Module) -> bool:
    return "_trl_plain_forward" in module.__dict__ and module.forward != module._trl_plain_forward


def with_self(forward: Callable, plain: Callable) -> Callable:
    """`forward(self, …)` with the signature of the bound `plain`: `transformers` inspects it."""
    signature = inspect.signature(plain)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[me, *signature.parameters.values()])
    del forward.__wrapped__
    return forward


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """The distinct configurations of `model` and its submodules."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Replace the forwards of these modules within the context."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Put `model` in training mode within the context; afterwards each module has its former mode."""
    evaluated = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in evaluated:
            module.training = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode (no dropout) within the context; afterwards each module has its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
