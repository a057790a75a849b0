"""Changes to a loaded model in place: a forward that takes one more keyword, and other forwards or evaluation mode for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

from torch import nn
from transformers import PreTrainedConfig


def patch_forward(module: nn.Module, forward: Callable) -> None:
    """Put `forward(self, …)` in the place of the module's own, which is `self._trl_plain_forward` from now on.

    A copy of the module is patched as well. A pickle of it, read again, has its own forward and can be patched anew.
    """
    module._trl_plain_forward = module.forward
    forward.__name__ = "forward"  # a pickle names a method, and finds that of the class
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
    """Every configuration that a part of `model` reads, once."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Within it, modules have these forwards in the place of theirs."""
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
    """`model` in training mode, for the moment."""
    evaluated = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in evaluated:
            module.training = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, without dropout, for the moment."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
