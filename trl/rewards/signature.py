"""The arguments of reward functions: a function is passed those that it names, or all if it takes `**columns`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl.errors import ConfigError, DataError, suggest

logger = logging.getLogger(__name__)

SAMPLES = ("prompts", "completions", "completion_ids")
PICTURES = ("prompts", "images", "pil_images")
EXTRAS = ("trainer_state", "log_extra", "log_metric")
BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def fitting(function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in `given` that the function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return dict(given)
    names = {p.name for p in parameters if p.kind in BY_KEYWORD}
    return {name: value for name, value in given.items() if name in names}


def check_pairs(prompts: Sequence[Any], completions: Sequence[Any]) -> None:
    """Raise DataError unless there is one completion for each prompt."""
    if len(prompts) != len(completions):
        raise DataError(f"{len(completions)} completions were given for {len(prompts)} prompts: give one each.")


def say_hidden(columns: Sequence[str], samples: Sequence[str] = SAMPLES) -> None:
    """Warn about columns of the dataset that reward functions cannot get, since samples are passed under the same names."""
    if hidden := sorted({*samples, *EXTRAS} & set(columns)):
        logger.warning(
            f"Reward functions are not passed the columns {hidden} of the dataset, since samples are passed under these names: "
            "rename the columns to use them."
        )


def check_arguments(
    name: str, function: Callable, columns: Sequence[str] | None, samples: Sequence[str] = SAMPLES
) -> None:
    """Raise ConfigError if the function has an argument that it will not be passed, or none that tells samples apart.

    `columns` are those of the dataset; None: not known yet, so that any name may be one. `samples` are the names under which
    samples are passed.
    """
    known = [*samples, *EXTRAS, *(columns or ())]
    parameters = inspect.signature(function).parameters.values()
    if positional := [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]:
        raise ConfigError(
            f"Reward function {name!r} takes {positional[0]!r} by position only, but arguments are passed by name."
        )
    required = [p.name for p in parameters if p.kind in BY_KEYWORD and p.default is inspect.Parameter.empty]
    missing = [each for each in required if each not in known]
    if missing and columns is not None:
        raise ConfigError(
            f"Reward function {name!r} has the argument {missing[0]!r}, which is not a column of the dataset."
            f"{suggest(missing[0], known, cutoff=0.75)} It can be passed: {', '.join(known)}. A column of another name can be "
            f"renamed (--dataset_rename old={missing[0]})."
        )
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if not takes_any and not {p.name for p in parameters} & set(samples):
        raise ConfigError(
            f"Reward function {name!r} takes none of {', '.join(samples)}, so it cannot tell samples apart: write it as "
            f"({samples[1]}, **columns)."
        )
