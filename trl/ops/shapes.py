"""Shapes that a function of tensors is declared to take, checked at every call.

    @shapes(rewards="N F", weights="F", group="N")
    def combine_rewards(rewards, weights, group, *, aggregation): ...

A letter is a dimension; the same letter is the same size everywhere. "..." is any shape, or any further dimensions ("M ..."),
the same for all arguments that have it. With a question mark a size may be 1 as well. Broadcasting would take `[N]` for
`[N,1]` in silence, and give `[N,N]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor

from trl.errors import ShapeError

P = ParamSpec("P")
R = TypeVar("R")


def shapes(**expected: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that checks the shapes of arguments, by name; numbers and None in place of tensors are not checked.

    The shapes are added to the function's docstring, so that `help` shows them. Raises ShapeError, naming the function, the
    argument, and the shapes expected and found.
    """
    dimensions = {name: each.split() for name, each in expected.items()}

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = list(inspect.signature(function).parameters)
        assert dimensions.keys() <= set(names), f"{function.__name__} has no {dimensions.keys() - set(names)}"

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            sizes: dict[str, int] = {}
            for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
                if name in dimensions and isinstance(value, Tensor) and not _fits(value, dimensions[name], sizes):
                    known = ", ".join(f"{letter}={size}" for letter, size in sizes.items())
                    raise ShapeError(
                        f"{function.__name__}: {name} has shape {tuple(value.shape)}, and [{expected[name]}] is expected"
                        f"{f' with {known}' if known else ''}."
                    )
            return function(*args, **kwargs)

        listed = ", ".join(f"{name} [{','.join(letters)}]" for name, letters in dimensions.items())
        checked.__doc__ = f"{inspect.getdoc(function) or ''}\n\nShapes: {listed}."
        return checked

    return decorate


def _fits(value: Tensor, letters: list[str], sizes: dict[str, int]) -> bool:
    """Whether a tensor has these dimensions; sizes that were not known before are taken from it."""
    *first, last = letters
    if last.startswith("..."):
        further = sizes.setdefault("...", value.dim() - len(first))
        letters = [*first, *(f"dim {i}{last.removeprefix('...')}" for i in range(further))]
    if value.dim() != len(letters):
        return False
    return all(
        (letter.endswith("?") and size == 1) or sizes.setdefault(letter.rstrip("?"), size) == size
        for letter, size in zip(letters, value.shape, strict=True)
    )
