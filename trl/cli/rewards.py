"""Reward functions by name.

accuracy_reward                      one of `trl.rewards`
get_length_reward(target=100)        one of those that are made from options
rewards.py:short                     a function in a file
my_package.rewards:polite            a function of a module; a dot will do for the colon
org/reward-model                     the hub name, or folder, of a reward model
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from trl.counts import counted
from trl.errors import ConfigError, suggest, suggest_beside, unknown

CALL = re.compile(r"(?P<name>[^()]+)\((?P<arguments>[^()]*)\)")


@dataclass
class RewardArguments:
    """What rewards the samples of an online method."""

    reward_funcs: list[str] | None = None
    """Functions: names of trl.rewards, file.py:function or package.module:function; or hub names of reward models."""

    reward_model_name_or_path: str | None = None
    """Hub name or folder of a reward model, before the functions."""

    ui: Literal["terminal", "web"] | None = None
    """Where people are asked by human_rating and human_preference: in the terminal, or on the web page of `trl label`.
    None: as the function says, which is the terminal unless it is human_rating(ui='web')."""

    def keywords(self) -> dict[str, Any]:
        """The trainer's `reward_funcs`, where there are any: the reward model first, then the functions."""
        model = self.reward_model_name_or_path
        rewards = [*([] if model is None else [model]), *map(find_reward, self.reward_funcs or [])]
        if self.ui is not None:
            _ask_people_on(self.ui, rewards)
        return {"reward_funcs": rewards} if rewards else {}


@dataclass
class RequiredRewards(RewardArguments):
    """The rewards of a method that cannot do without."""

    def __post_init__(self) -> None:
        if not self.reward_funcs and self.reward_model_name_or_path is None:
            raise ConfigError(
                "--reward_funcs is missing: give a name of trl.rewards, file.py:function, package.module:function, or the hub "
                "name of a reward model (--reward_model_name_or_path)."
            )


@dataclass
class PictureRewards(RewardArguments):
    """The rewards of a method for diffusion models: functions of pictures."""

    def __post_init__(self) -> None:
        if self.reward_model_name_or_path is not None:
            raise ConfigError(
                "reward_model_name_or_path is of texts. Pictures are rewarded by functions: --reward_funcs get_clip_reward, "
                "'get_clip_reward(model=\"…\")', get_aesthetic_reward, file.py:function."
            )
        if not self.reward_funcs:
            raise ConfigError(
                "--reward_funcs is missing: give a name of trl.rewards (jpeg_compressibility_reward, get_clip_reward, …), "
                "file.py:function or package.module:function, of (prompts, images, **columns)."
            )

    def keywords(self) -> dict[str, Any]:
        return {"reward_funcs": [find_reward(name, of_pictures=True) for name in self.reward_funcs]}


def check_reward_weights(weights: Sequence[float] | None, arguments: RewardArguments) -> None:
    """Raises ConfigError where `reward_weights` are not one for each reward function."""
    model, functions = arguments.reward_model_name_or_path, arguments.reward_funcs or []
    names = [*([] if model is None else [model]), *functions]
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"reward_weights has {counted(len(weights), 'value')} for {counted(len(names), 'reward function')} "
            f"({', '.join(names)}): give one each."
        )


def _ask_people_on(ui: str, rewards: Sequence[Callable | str]) -> None:
    from trl.rewards.human import HumanPreference, HumanRating

    people = [reward for reward in rewards if isinstance(reward, HumanPreference | HumanRating)]
    if not people:
        raise ConfigError(f"ui={ui!r} says where people are asked, and reward_funcs asks none: add human_rating.")
    for person in people:
        person.use(ui)


def find_reward(name: str, *, of_pictures: bool = False) -> Callable | str:
    """The function that `name` stands for, or the name itself if it is that of a reward model.

    `of_pictures`: it rewards pictures, and not texts.
    """
    call = CALL.fullmatch(name)
    plain = name if call is None else call["name"]
    source, found = _located(plain)
    if found is None:
        return name
    if call is not None:
        found = _made(plain, found, *_arguments(name, call["arguments"]))
    elif isinstance(found, type):
        found = _made(plain, found, [], {})
    from trl.rewards.signature import PICTURES, SAMPLES, check_arguments

    check_arguments(source, found, None, PICTURES if of_pictures else SAMPLES)
    return found


def _located(name: str) -> tuple[str, Callable | None]:
    """What stands under a name, and what to call it; None if it is the name of a reward model."""
    file, colon, function = name.rpartition(":")
    if colon:
        module = _module_in(Path(file).expanduser(), name) if file.endswith(".py") else _module(file, name)
        return function, _member(module, function, name)
    if name.endswith(".py"):
        functions = _functions(_module_in(Path(name).expanduser(), name))
        raise ConfigError(
            f"reward_funcs={name!r} names a file: give {name}:FUNCTION. It has {', '.join(functions) or 'none'}."
        )
    if "/" in name or Path(name).is_dir():
        return name, None
    module, dot, function = name.rpartition(".")
    return function, _member(_module(module, name), function, name) if dot else _registered(name)


def _registered(name: str) -> Callable:
    import trl.rewards

    if name not in trl.rewards.__all__:
        raise ConfigError(
            f"{unknown('reward function', name, trl.rewards.__all__)} One of your own is file.py:function or "
            "package.module:function."
        )
    return getattr(trl.rewards, name)


def _module(module: str, name: str) -> ModuleType:
    """The module, which may stand in the current folder."""
    _search_in(Path.cwd())
    for part in accumulate(module.split("."), "{}.{}".format):
        if importlib.util.find_spec(part) is None:
            raise ConfigError(f"reward_funcs={name!r}: there is no module {part!r}.")
    with _explained(name):
        return importlib.import_module(module)


def _module_in(file: Path, name: str) -> ModuleType:
    """The module that a file makes; what stands beside the file can be imported from it."""
    if not file.is_file():
        raise ConfigError(f"reward_funcs={name!r}: there is no file {str(file)!r}.{suggest_beside(file)}")
    _search_in(file.resolve().parent)
    own_name = f"{file.stem}_py"  # a name of its own, so that a file called random.py hides nothing
    spec = importlib.util.spec_from_file_location(own_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module
    with _explained(name):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raises ConfigError for whatever a user's module raises while it is imported, and says where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        is_syntax = isinstance(error, SyntaxError)
        place = error if is_syntax else traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"reward_funcs={name!r} cannot be imported: {type(error).__name__}: {error.msg if is_syntax else error} "
            f"({place.filename}, line {place.lineno})."
        ) from error


def _search_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def _functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _member(module: ModuleType, function: str, name: str) -> Callable:
    known = _functions(module)
    if function not in known:
        where = Path(module.__file__).name if module.__file__ else module.__name__
        raise ConfigError(
            f"reward_funcs={name!r}: {where} has no function {function!r}.{suggest(function, known)} "
            f"It has {', '.join(known) or 'none'}."
        )
    return getattr(module, function)


# ---- functions that are made from options ----


def _arguments(name: str, text: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments, from what stands in parentheses: Python literals."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        return [ast.literal_eval(each) for each in call.args], {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"reward_funcs={name!r}: write arguments as in get_length_reward(target=100), with plain values."
        ) from error


def _made(name: str, maker: Callable, given: Sequence[Any], named: Mapping[str, Any]) -> Callable:
    """The reward function that `maker` makes of arguments."""
    parameters = inspect.signature(maker).parameters
    for each in named:
        if each not in parameters:
            raise ConfigError(unknown(f"argument of {name}", each, parameters))
    required = [p.name for p in list(parameters.values())[len(given) :] if p.default is inspect.Parameter.empty]
    if missing := [each for each in required if each not in named]:
        shown = ", ".join(f"{each}=…" for each in required)
        raise ConfigError(f"{name} is made from options, and {missing[0]} is missing: write '{name}({shown})'.")
    return maker(*given, **named)
