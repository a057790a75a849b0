"""Checks of options that are mappings, when a configuration is made: their types, and the names of their entries."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.utils import ProjectConfiguration
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig

from trl.errors import ConfigError, suggest
from trl.imports import check_available
from trl.models.attention_packages import check_attention_packages

FILES = ("accelerator_config", "fsdp_config", "deepspeed")
"""Options that may also be the name of a JSON file."""

LOADING = ("model_init_kwargs", "ref_model_init_kwargs")
"""Options that hold keyword arguments of `from_pretrained`."""

SCHEDULE_ARGUMENTS = ("optimizer", "num_warmup_steps", "num_training_steps")
"""Arguments of schedules that the trainer gives."""

OPTIMIZER_ARGUMENTS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
"""Optimizer → the entries of `optim_args` that `transformers` reads for it; it ignores others."""


def check_mappings(args: Any) -> None:
    """Raises ConfigError for an option that takes a mapping and is given something else, or an unknown entry."""
    entries = known_entries()
    for name in [*args._VALID_DICT_FIELDS, "liger_kernel_config"]:
        given = getattr(args, name, None)
        if not _is_file(name, given) and not isinstance(given, AcceleratorConfig):
            mapping = read_mapping(name, given)
            check_names(name, mapping, entries.get(name, mapping))
    given = getattr(args, "parallelism_config", None)
    if not isinstance(given, ParallelismConfig | None):
        raise ConfigError(f"parallelism_config={given!r}: give a ParallelismConfig of accelerate, or leave it out.")


def known_entries() -> dict[str, list[str]]:
    """Option → names of the entries that it may have, for those that are passed to one function or class."""
    parameters = inspect.signature(checkpoint).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "function"]
    checkpointing = [*named, "preserve_rng_state", "offload"]  # of torch's **kwargs, and of transformers
    return {
        "accelerator_config": [*AcceleratorConfig.__dataclass_fields__],
        "project_kwargs": [*ProjectConfiguration.__dataclass_fields__],
        "gradient_checkpointing_kwargs": checkpointing,
        "activation_checkpointing_kwargs": checkpointing,
    }


def _is_file(name: str, given: Any) -> bool:
    """Whether an option is given as the name of a file. Raises ConfigError if there is no such file."""
    if name not in FILES or not isinstance(given, str) or given.lstrip().startswith("{"):
        return False
    if not Path(given).expanduser().is_file():
        raise ConfigError(f"{name}={given!r}: there is no such file.")
    return True


def read_mapping(name: str, given: Any) -> Mapping[str, Any]:
    """The mapping that is the value of option `name`, which may be given as JSON; empty for None. Raises ConfigError."""
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        found = given
    if not isinstance(found, Mapping | None):
        raise ConfigError(f'{name}={given!r}: give a mapping of names to values, {{"name": value}}.')
    return found or {}


def check_entries(args: Any) -> None:
    """Raises ConfigError for entries that depend on other options, once mappings given as JSON are read."""
    for name in LOADING:
        _check_loading(getattr(args, name, None) or {})
    _check_schedule(args)
    _check_optim_args(args)


def check_names(option: str, given: Mapping[str, Any] | None, known: Iterable[str]) -> None:
    """Raises ConfigError if the mapping that is the value of `option` has entries with other names than the known ones."""
    known = list(known)
    for name in given or ():
        if name not in known:
            raise ConfigError(f"{option} has no entry {name!r}.{suggest(str(name), known)} Known: {', '.join(known)}.")


def _check_loading(given: Mapping[str, Any]) -> None:
    """Raises MissingPackageError if keyword arguments of `from_pretrained` need a package that is not installed."""
    check_attention_packages(given.get("attn_implementation"))
    for name in ("load_in_4bit", "load_in_8bit"):
        if given.get(name):
            check_available("bitsandbytes", to=name)


def _check_schedule(args: Any) -> None:
    """Raises ConfigError unless a schedule can be made of `lr_scheduler_type` and `lr_scheduler_kwargs`."""
    kind, given = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    schedules = TYPE_TO_SCHEDULER_FUNCTION | {SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau}
    parameters = inspect.signature(schedules[kind]).parameters.values()
    known = [p.name for p in parameters if p.name not in SCHEDULE_ARGUMENTS and p.kind is not p.VAR_KEYWORD]
    near = "".join(suggest(str(name), known) for name in given if name not in known)
    groups = max((len(value) for value in given.values() if isinstance(value, list | tuple)), default=1)
    try:
        optimizer = torch.optim.SGD([{"params": torch.zeros(1)} for _ in range(groups)], lr=1.0)
        get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=10**9, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as error:
        takes = f" It takes {', '.join(known)}." if known else ""
        raise ConfigError(
            f"lr_scheduler_kwargs={given!r} does not fit lr_scheduler_type={kind.value!r}: {error}.{near}{takes}"
        ) from error


def _check_optim_args(args: Any) -> None:
    """Raises ConfigError for `optim_args` that are not name=value, and for names that the optimizer does not read."""
    given, optimizer = args.optim_args, str(getattr(args.optim, "value", args.optim))
    if not isinstance(given, str | None):
        raise ConfigError(f"optim_args={given!r}: give text, 'name=value' with commas between several.")
    for entry in given.replace(" ", "").split(",") if given else ():
        name, equals, value = entry.partition("=")
        if not (name and equals and value) or "=" in value:
            raise ConfigError(f"optim_args={given!r}: {entry!r} is not name=value.")
        known = OPTIMIZER_ARGUMENTS.get(optimizer, (name,))
        if name not in known:
            raise ConfigError(
                f"optim_args={given!r}: optim={optimizer!r} does not read {name!r}.{suggest(name, known)} It reads "
                f"{', '.join(known) or 'none'}."
            )
