"""Find reward functions by the names given on the command line.

accuracy_reward                      one of `trl.rewards`
get_length_reward(target=100)        a factory of `trl.rewards`, called with these arguments
rewards.py:short                     a function in a file
my_package.rewards:polite            a function in a module; a dot also works in place of the colon
org/reward-model                     the hub name or folder of a reward model
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
    """Options for the rewards of sampled completions."""

    reward_funcs: list[str] | None = None
    """Reward functions: names from trl.rewards, file.py:function or package.module:function; or hub names of reward
    models."""

    reward_model_name_or_path: str | None = None
    """Hub name or folder of a reward model; it comes before the functions, in `reward_weights` as well."""

    ui: Literal["terminal", "web"] | None = None
    """Where human_rating and human_preference ask people: in the terminal, or on the web page of `trl label`. None: the
    terminal, unless the function itself says otherwise, as human_rating(ui='web') does."""

    def keywords(self) -> dict[str, Any]:
        """The `reward_funcs` argument of the trainer, if any: the reward model first, then the functions."""
        model = self.reward_model_name_or_path
        rewards = [*([] if model is None else [model]), *map(find_reward, self.reward_funcs or [])]
        if self.ui is not None:
            _ask_people_on(self.ui, rewards)
        return {"reward_funcs": rewards} if rewards else {}


@dataclass
class RequiredRewards(RewardArguments):
    """Options for the rewards of a method that requires at least one."""

    def __post_init__(self) -> None:
        if not self.reward_funcs and self.reward_model_name_or_path is None:
            raise ConfigError(
                "--reward_funcs is missing: give a name from trl.rewards, file.py:function, package.module:function, or "
                "the hub name of a reward model (--reward_model_name_or_path)."
            )


@dataclass
class PictureRewards(RewardArguments):
    """Options for the rewards of diffusion methods, which are functions of pictures."""

    def __post_init__(self) -> None:
        if self.reward_model_name_or_path is not None:
            raise ConfigError(
                "reward_model_name_or_path is for texts. Pictures are rewarded by functions: --reward_funcs get_clip_reward, "
                "'get_clip_reward(model=\"…\")', get_aesthetic_reward, file.py:function."
            )
        if not self.reward_funcs:
            raise ConfigError(
                "--reward_funcs is missing: give a name from trl.rewards (jpeg_compressibility_reward, get_clip_reward, …), "
                "file.py:function or package.module:function, with arguments (prompts, images, **columns)."
            )

    def keywords(self) -> dict[str, Any]:
        return {"reward_funcs": [find_reward(name, of_pictures=True) for name in self.reward_funcs]}


def check_reward_weights(weights: Sequence[float] | None, arguments: RewardArguments) -> None:
    """Raises ConfigError unless `reward_weights` has one value per reward function."""
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
        raise ConfigError(
            f"ui={ui!r} says where to ask people, but reward_funcs asks nobody: add human_rating, or leave ui out."
        )
    for person in people:
        person.use(ui)


def find_reward(name: str, *, of_pictures: bool = False) -> Callable | str:
    """The reward function called `name`, or `name` itself if it names a reward model.

    With `of_pictures`, the function must reward pictures instead of texts. Raises ConfigError if there is no such
    function.
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
    """The plain name of a reward function, and the function; None in its place for the name of a reward model."""
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
            f"{unknown('reward function', name, trl.rewards.__all__)} For your own function, write file.py:function or "
            "package.module:function."
        )
    return getattr(trl.rewards, name)


def _module(module: str, name: str) -> ModuleType:
    """Import the module, from the current folder as well."""
    _search_in(Path.cwd())
    for part in accumulate(module.split("."), "{}.{}".format):
        if importlib.util.find_spec(part) is None:
            raise ConfigError(f"reward_funcs={name!r}: there is no module {part!r}.")
    with _explained(name):
        return importlib.import_module(module)


def _module_in(file: Path, name: str) -> ModuleType:
    """Import the file as a module; it may import other files from its folder."""
    if not file.is_file():
        raise ConfigError(f"reward_funcs={name!r}: there is no file {str(file)!r}.{suggest_beside(file)}")
    _search_in(file.resolve().parent)
    own_name = f"{file.stem}_py"  # so that a file called random.py does not shadow the standard library
    spec = importlib.util.spec_from_file_location(own_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module
    with _explained(name):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn an error in the import of a user's module into a ConfigError with file and line."""
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


# ---- factories of reward functions ----


def _arguments(name: str, text: str) -> tuple[list[Any], dict[str, Any]]:
    """Parse positional and keyword arguments, which are Python literals, from the text in parentheses."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        return [ast.literal_eval(each) for each in call.args], {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"reward_funcs={name!r}: write arguments as in get_length_reward(target=100), with plain values."
        ) from error


def _made(name: str, maker: Callable, given: Sequence[Any], named: Mapping[str, Any]) -> Callable:
    """Call the factory `maker` with these arguments. Raises ConfigError for unknown or missing ones."""
    parameters = inspect.signature(maker).parameters
    for each in named:
        if each not in parameters:
            raise ConfigError(unknown(f"argument of {name}", each, parameters))
    required = [p.name for p in list(parameters.values())[len(given) :] if p.default is inspect.Parameter.empty]
    if missing := [each for each in required if each not in named]:
        shown = ", ".join(f"{each}=…" for each in required)
        raise ConfigError(f"{name} needs the argument {missing[0]}: write '{name}({shown})'.")
    return maker(*given, **named)
