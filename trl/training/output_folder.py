"""An output folder belongs to one run.

    output_dir/_run.json      which run's: method, model, rows, options (see `trl.training.run_settings`)

A run that finds checkpoints or a model of another one there would resume from them, rotate them away, or leave an adapter
beside a whole model: it is refused, and told to overwrite if that is meant. Names that begin with `_` are not uploaded.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trl.errors import ConfigError, listed
from trl.models.files import WEIGHTS
from trl.training.checkpoint import checkpoints, remove, remove_checkpoints
from trl.training.run_settings import SETTINGS_FILE, SHOWN

logger = logging.getLogger(__name__)

OWNER_FILE = "_run.json"
BESIDE_WEIGHTS = ("config.json", "generation_config.json", "adapter_config.json")
"""Files that make a folder a model, with its weights."""


def check_folder(folder: str | Path, run: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that `run` may write to a folder. With `overwrite`, what an earlier run left there is removed.

    What is not known of `run` yet is not compared (see `trl.training.run_settings.describe_options`).

    Raises ConfigError where the folder holds another run, or the model itself that is trained.
    """
    folder = Path(folder).expanduser()
    if is_trained_model(folder, run):
        raise ConfigError(
            f"output_dir={str(folder)!r} is the folder of the model that is trained: what is saved there would replace it. "
            "Name another folder."
        )
    if overwrite:
        remove_results(folder)
    elif has_results(folder) and (difference := difference_from(folder, run)):
        raise ConfigError(
            f"output_dir={str(folder)!r} holds another run ({difference}). Name another folder; or give overwrite_output_dir, "
            "which removes that run's checkpoints and model; or, to resume it, resume_from_checkpoint (--resume)."
        )


def say_beginning_anew(folder: str | Path) -> None:
    """Say that a run that begins at its start has checkpoints to go on from."""
    if left := checkpoints(Path(folder)):
        logger.warning(
            f"output_dir={str(folder)!r} holds {left[0].name} of this run, and training begins anew: to go on from it, stop, and "
            "give --resume (resume_from_checkpoint='last')."
        )


def foresee(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Say where `check_folder` will refuse `run`: before its rows are encoded, when it may yet resume the other, or evaluate."""
    try:
        check_folder(folder, run, overwrite=False)
    except ConfigError as error:
        logger.warning(f"train() will be refused, unless it resumes a run: {error}")


def check_writable(folder: str | Path) -> None:
    """Raises ConfigError for a folder that is not there and cannot be made, or cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir={str(folder)!r} cannot be made ({error.strerror}). Name another folder."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"output_dir={str(folder)!r} cannot be written to. Name another folder, or mend its permissions."
        )


def claim(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Write down that what a folder holds is of `run`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")


def check_space(folder: str | Path, needed: int, *, has_checkpoints: bool = True) -> None:
    """Raises ConfigError where a checkpoint of `needed` bytes, or the model alone, does not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        less = (
            ", or save less: save_only_model leaves out the optimizer, --save_strategy no saves nothing but the model at the end"
            if has_checkpoints
            else ""
        )
        raise ConfigError(
            f"output_dir={str(folder)!r}: {'a checkpoint' if has_checkpoints else 'the model'} takes about {needed / 1e9:,.1f} GB, "
            f"and {free / 1e9:,.1f} GB are free. Make room, or name a folder on another disk{less}."
        )


def checkpoint_bytes(model: nn.Module, *, has_optimizer: bool, only_trained: bool) -> int:
    """Bytes of a checkpoint: weights, those that are trained alone with an adapter, and two moments of each that is trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    weights = trained if only_trained else sum(size for size, _ in sizes)
    return weights + (2 * trained if has_optimizer else 0)


def is_trained_model(folder: Path, run: Mapping[str, Any]) -> bool:
    """Whether the model that `run` trains, or the adapter, lies in the folder."""
    names = [Path(run[name]).expanduser().resolve() for name in ("model", "adapter") if run.get(name)]
    return folder.resolve() in names and bool(model_files(folder))


def model_files(folder: Path) -> list[Path]:
    """The weights in a folder, and what goes with them."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    weights = [path for path in files if WEIGHTS.fullmatch(path.name) or path.name.endswith(".index.json")]
    return [*weights, *(path for path in files if path.name in BESIDE_WEIGHTS)] if weights else []


def has_results(folder: Path) -> bool:
    return bool(checkpoints(folder) or model_files(folder))


def remove_results(folder: Path) -> None:
    """Remove the checkpoints and the model that an earlier run left."""
    remove_checkpoints(folder)
    for path in model_files(folder):
        logger.info(f"Removing {path}, of an earlier run (overwrite_output_dir).")
        remove(path)


def difference_from(folder: Path, run: Mapping[str, Any]) -> str:
    """How `run` differs from the one whose results are in the folder; empty if it is that run once more."""
    files = [folder / OWNER_FILE, *(path / SETTINGS_FILE for path in checkpoints(folder))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return "of which nothing is known here: no run of this library wrote it, or an earlier version"
    try:
        return _difference(json.loads(file.read_text(encoding="utf-8")), run)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{file.name} cannot be read"


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for name in ("trainer", "optim"):
        if then[name] != now[name]:
            return f"{name} {then[name]!r} there, {now[name]!r} here"
    for name in ("model", "adapter"):
        given = [each.get(name, "") for each in (then, now)]
        if name in then and name in now and Path(given[0]).resolve() != Path(given[1]).resolve():
            there, here = (repr(each) if each else "none by name" for each in given)
            return f"{name} {there} there, {here} here"
    if "parameters" in now and then["parameters"] != now["parameters"]:
        return "which trains other parameters: another adapter, or none"
    if then["rows"] and now.get("rows") and then["rows"] != now["rows"]:
        return f"other rows: {then['rows']['count']:,} there, {now['rows']['count']:,} here"
    before, after = then["options"], now["options"]
    changed = [f"{k} {before[k]!r} there, {after[k]!r} here" for k in after if k in before and before[k] != after[k]]
    return listed(changed, SHOWN, "; ")
