"""Reward functions by name: `--reward_funcs rewards.py:short my_package.rewards.polite org/reward-model`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trl.errors import ConfigError, suggest


@dataclass
class RewardArguments:
    """What rewards the samples of an online method."""

    reward_funcs: list[str] | None = None
    """Functions: file.py:function, package.module.function or one of trl.rewards; or hub names of reward models."""

    reward_model_name_or_path: str | None = None
    """Hub name or folder of a reward model, beside the functions."""


def reward_keywords(arguments: RewardArguments) -> dict[str, Any]:
    """The `reward_funcs` of an online trainer: the functions, and the reward model last."""
    rewards = [find_reward(name) for name in arguments.reward_funcs or []]
    if arguments.reward_model_name_or_path is not None:
        rewards.append(arguments.reward_model_name_or_path)
    if not rewards:
        raise ConfigError(
            "reward_funcs is missing: give file.py:function, package.module.function, or the hub name of a reward model "
            "(--reward_model_name_or_path)."
        )
    return {"reward_funcs": rewards}


def find_reward(name: str) -> Callable | str:
    """The function that `name` stands for, or the name itself if it is that of a reward model."""
    file, colon, function = name.rpartition(":")
    if colon:
        module = _module_in(Path(file).expanduser()) if file.endswith(".py") else _module(file, name)
        return _member(module, function, name)
    if "/" in name or Path(name).is_dir():
        return name
    module, dot, function = name.rpartition(".")
    return _member(_module(module if dot else "trl.rewards", name), function, name)


def _module(module: str, name: str) -> ModuleType:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ConfigError(f"reward_funcs={name!r}: there is no module {module!r}.")
    return importlib.import_module(module)


def _module_in(file: Path) -> ModuleType:
    if not file.is_file():
        raise ConfigError(f"reward_funcs: there is no file {str(file)!r}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _member(module: ModuleType, function: str, name: str) -> Callable:
    known = [each for each in dir(module) if not each.startswith("_")]
    if function not in known:
        raise ConfigError(f"reward_funcs={name!r}: {module.__name__} has no {function!r}.{suggest(function, known)}")
    return getattr(module, function)
