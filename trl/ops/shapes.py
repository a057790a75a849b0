"""A decorator that declares the shapes of a function's tensor arguments, and checks them at every call.

    @shapes(rewards="N F", weights="F", group="N")
    def combine_rewards(rewards, weights, group, *, aggregation): ...

A letter is a dimension, which has the same size in all arguments. "..." stands for any shape, or any further dimensions
("M ..."), the same in all arguments. A dimension with a question mark may have size 1 as well. Without the check, broadcasting
`[N]` where `[N,1]` is meant would silently give `[N,N]`.
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
    """Decorate a function to check the shapes of its arguments, given by name. Arguments that are not tensors are not checked.

    The shapes are added to the function's docstring, so that `help` shows them. Calls raise ShapeError with the function, the
    argument, and the expected and actual shapes.
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
                        f"{function.__name__}: {name} has shape {tuple(value.shape)}, but [{expected[name]}] is expected"
                        f"{f' with {known}' if known else ''}."
                    )
            return function(*args, **kwargs)

        listed = ", ".join(f"{name} [{','.join(letters)}]" for name, letters in dimensions.items())
        checked.__doc__ = f"{inspect.getdoc(function) or ''}\n\nShapes: {listed}."
        return checked

    return decorate


def _fits(value: Tensor, letters: list[str], sizes: dict[str, int]) -> bool:
    """Whether a tensor has these dimensions. Sizes of new letters are recorded in `sizes`."""
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
