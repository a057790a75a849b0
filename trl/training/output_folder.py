"""Check that an output folder is used for one run only.

    output_dir/_run.json      settings of that run: method, model, rows, options (see `trl.training.run_settings`)

A run that finds the checkpoints or the model of another run there would resume from them, delete them, or save an adapter beside
a full model. So it is refused, unless overwrite_output_dir is set. Files whose names begin with `_` are not uploaded to the hub.
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
"""Configuration files of a model, beside its weights."""


def check_folder(folder: str | Path, run: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that `run` may write to a folder. With `overwrite`, the results of an earlier run there are removed.

    Settings that `run` does not contain yet are not compared (see `trl.training.run_settings.describe_options`).

    Raises ConfigError if the folder has results of another run, or is that of the model to train.
    """
    folder = Path(folder).expanduser()
    if is_trained_model(folder, run):
        raise ConfigError(
            f"output_dir={str(folder)!r} is the folder of the model to train, which would be overwritten. Name another folder."
        )
    if overwrite:
        remove_results(folder)
    elif has_results(folder) and (difference := difference_from(folder, run)):
        raise ConfigError(
            f"output_dir={str(folder)!r} holds another run ({difference}). Name another folder; or set overwrite_output_dir, "
            "which removes that run's checkpoints and model; or, to resume that run, resume_from_checkpoint (--resume)."
        )


def warn_of_restart(folder: str | Path) -> None:
    """Warn if a run starts from the beginning although its folder has checkpoints of it."""
    if left := checkpoints(Path(folder)):
        logger.warning(
            f"output_dir={str(folder)!r} holds {left[0].name} of this run, but training starts from the beginning: to resume, "
            "stop, and give --resume (resume_from_checkpoint='last')."
        )


def warn_of_refusal(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Warn before rows are encoded that `check_folder` will refuse `run`. No error yet: it may only evaluate, or resume."""
    try:
        check_folder(folder, run, overwrite=False)
    except ConfigError as error:
        logger.warning(f"train() will fail, unless it resumes a run: {error}")


def check_writable(folder: str | Path) -> None:
    """Create a folder if it does not exist. Raises ConfigError if that fails, or it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir={str(folder)!r} cannot be created ({error.strerror}). Name another folder."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"output_dir={str(folder)!r} cannot be written to. Name another folder, or correct its permissions."
        )


def claim(folder: str | Path, run: Mapping[str, Any]) -> None:
    """Record in a folder that its results belong to `run`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER_FILE).write_text(json.dumps(run, indent=1), encoding="utf-8")


def check_space(folder: str | Path, needed: int, *, has_checkpoints: bool = True) -> None:
    """Raises ConfigError if `needed` bytes, of a checkpoint or of the model alone, do not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        less = (
            ", or save less: save_only_model leaves out the optimizer, --save_strategy no saves only the model at the end"
            if has_checkpoints
            else ""
        )
        raise ConfigError(
            f"output_dir={str(folder)!r}: {'a checkpoint' if has_checkpoints else 'the model'} takes about {needed / 1e9:,.1f} GB, "
            f"but only {free / 1e9:,.1f} GB are free. Make room, or name a folder on another disk{less}."
        )


def checkpoint_bytes(model: nn.Module, *, has_optimizer: bool, only_trained: bool) -> int:
    """Bytes of a checkpoint: weights (with `only_trained`, of the adapter only), and Adam's two moments of trained ones."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    weights = trained if only_trained else sum(size for size, _ in sizes)
    return weights + (2 * trained if has_optimizer else 0)


def is_trained_model(folder: Path, run: Mapping[str, Any]) -> bool:
    """Whether the folder is the one from which `run` loads its model or adapter."""
    names = [Path(run[name]).expanduser().resolve() for name in ("model", "adapter") if run.get(name)]
    return folder.resolve() in names and bool(model_files(folder))


def model_files(folder: Path) -> list[Path]:
    """The weight files in a folder with their index and configuration files; empty if it has no weights."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    weights = [path for path in files if WEIGHTS.fullmatch(path.name) or path.name.endswith(".index.json")]
    return [*weights, *(path for path in files if path.name in BESIDE_WEIGHTS)] if weights else []


def has_results(folder: Path) -> bool:
    return bool(checkpoints(folder) or model_files(folder))


def remove_results(folder: Path) -> None:
    """Remove the checkpoints and the model of an earlier run."""
    remove_checkpoints(folder)
    for path in model_files(folder):
        logger.info(f"Removing {path}, of an earlier run (overwrite_output_dir).")
        remove(path)


def difference_from(folder: Path, run: Mapping[str, Any]) -> str:
    """How `run` differs from the run whose results are in the folder; empty if it has the same settings."""
    files = [folder / OWNER_FILE, *(path / SETTINGS_FILE for path in checkpoints(folder))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return "without a record of its settings: another library wrote it, or an earlier version of this one"
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
        there, here = then["rows"]["count"], now["rows"]["count"]
        return (
            f"other rows: {there:,} there, {here:,} here" if there != here else f"{here:,} rows there, and others here"
        )
    before, after = then["options"], now["options"]
    changed = [f"{k} {before[k]!r} there, {after[k]!r} here" for k in after if k in before and before[k] != after[k]]
    return listed(changed, SHOWN, "; ")
