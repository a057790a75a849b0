"""Builds the configuration of a trainer from the arguments of its constructor."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainingArguments

from trl.compat.options import asks_for_nothing, remedy
from trl.errors import ConfigError
from trl.option_types import settable
from trl.trainers.config import TrainerConfig, is_same


def resolve_args(
    config_class: type[TrainerConfig],
    args: TrainingArguments | None,
    given: Mapping[str, Any],
    *,
    trainer: str,
    model: Any = None,
) -> TrainerConfig:
    """A configuration of `config_class` made of `args` and of the options `given` as keywords of the trainer.

    `args` may be plain `TrainingArguments`. Without `args`, output_dir is named after the model and the method. Raises
    ConfigError for a keyword that is no option.
    """
    options = resolve_options(config_class, given, trainer=trainer)
    if args is None:
        return config_class(**{**_folder_of(model, trainer), **options})
    _check_class(config_class, args, trainer)
    if not isinstance(args, config_class):
        return config_class(**{**_shared_options(config_class, args), **options})
    return with_options(args, options)


def with_options(args: TrainerConfig, options: Mapping[str, Any]) -> TrainerConfig:
    """A copy of `args` with other `options`.

    What follows from others (the averaging from `loss_type`, say) follows from the new ones: a configuration is made anew of all
    that was given, and the copy takes what differs in it. The code and fields of a script's class are left alone.
    """
    copied, options = copy.copy(args), {**args.changed(), **options}
    if not options:
        return copied
    before = vars(args)
    anew = _made_anew(args, options)
    made = {name: value for name, value in vars(anew).items() if not is_same(value, before.get("_made", {}).get(name))}
    for name, value in options.items():
        setattr(copied, name, value)
    vars(copied).update(made)
    return copied


def _made_anew(args: TrainerConfig, options: Mapping[str, Any]) -> TrainerConfig:
    """The configuration that the class of this package makes of what `args` was given and other `options`."""
    cls = args.package_class()
    known = {name: value for name, value in options.items() if name in cls.__dataclass_fields__}
    others = {other for names in cls.EXCLUSIVE for other in names if known.keys() & {*names}} - known.keys()
    given = {name: value for name, value in vars(args).get("_given", args.options_now()).items() if name not in others}
    anew = cls.__new__(cls)
    vars(anew)["_said"] = vars(args).get("_said", set())
    anew.__init__(**given | known)
    return anew


def _shared_options(config_class: type[TrainerConfig], args: TrainingArguments) -> dict[str, Any]:
    """The options of plain `TrainingArguments`, with those of `config_class` that a script added to them, if not None.

    They may be fields of a subclass or set as attributes, and have their older names.
    """
    names = {f.name for f in settable(config_class) if f.init}
    plain = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = {name: getattr(args, name) for name in plain & names}
    added = {*names, *config_class.ALIASES} - plain
    given = {name: value for name, value in vars(args).items() if name in added and value is not None}
    return {**own, **config_class.translated(given)}


def _check_class(config_class: type[TrainerConfig], args: Any, trainer: str) -> None:
    """Raises ConfigError for the configuration of another trainer, and for anything else that is not a configuration."""
    wanted = config_class.__name__
    if not isinstance(args, TrainingArguments):
        given = f"{wanted}(**args)" if isinstance(args, Mapping) else f"{wanted}(…)"
        raise ConfigError(f"args is a {type(args).__name__}: {trainer} takes {given}.")
    if (
        isinstance(args, TrainerConfig)
        and not isinstance(args, config_class)
        and not issubclass(config_class, type(args))
    ):
        raise ConfigError(f"args is a {type(args).__name__}, of another method: {trainer} takes {wanted}(…).")


def _folder_of(model: Any, trainer: str) -> dict[str, str]:
    """The default `output_dir`: "Qwen2.5-0.5B-SFT" for "Qwen/Qwen2.5-0.5B" and SFTTrainer."""
    name = str(model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", ""))
    last = name.rstrip("/").rpartition("/")[2]
    return {"output_dir": f"{last}-{trainer.removesuffix('Trainer')}"} if last else {}


def resolve_options(config_class: type[TrainerConfig], given: Mapping[str, Any], *, trainer: str) -> dict[str, Any]:
    """The options among the keywords of a trainer, with older names translated. Raises ConfigError for unknown keywords."""
    known = [*(f.name for f in settable(config_class)), *config_class.ALIASES]
    options = {name: value for name, value in given.items() if name in known or not asks_for_nothing(name, value)}
    for name in options:
        if name not in known:
            arguments = [*known, *Trainer.__init__.__annotations__, "tokenizer", "peft_config"]
            raise ConfigError(f"{trainer} has no argument {name!r}.{remedy(name, arguments)}")
    return config_class.translated(options)
