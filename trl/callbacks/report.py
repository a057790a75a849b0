"""Write the log and options of a run as `run.json`, and at its end the report page `report.html`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback, TrainerState, TrainingArguments

from trl import __version__
from trl.models.load import count_parameters
from trl.report.page import write, write_report
from trl.report.record import RUN_FILE, read_run_file
from trl.training.auxiliary_files import not_fatal

logger = logging.getLogger(__name__)

version_of = cache(importlib.metadata.version)
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers")

LIVE = 2.0
"""Least seconds between two writes of the log during a run."""

SHARE = 0.01
"""Largest share of a run's time for writing its log: a long log is written less often."""

DERIVED = {"accelerator_config", "dataloader_pin_memory", "debug", "do_eval", "output_dir"}
"""Options that the configuration sets by itself, and `output_dir`, which the page's title shows."""

INCOMPLETE = (
    "# The options of the trainer. The dataset, adapters, quantisation and rewards are not among them: add theirs.\n"
)
"""First line of the configuration file: the trainer was given the other parts of a run as objects."""


class ReportCallback(TrainerCallback):
    """Writes `run.json` to the output folder during a run, and at the end the page as well.

    An evaluation after the end is added to both. A resumed run keeps its start time, and adds to the time it took before.

    data    lines about the dataset, for the page
    rows    function that returns some rows as the model is trained on them, `{"prompt", "completions"}`, for the page
    """

    def __init__(
        self, data: tuple[str, ...] = (), rows: Callable[[], Sequence[Mapping[str, Any]]] | None = None
    ) -> None:
        self.data, self._rows = data, rows
        self.rows: Sequence[Mapping[str, Any]] = ()
        self.started, self.seconds_before, self.clock = _now(), 0.0, time.monotonic()
        self.trains, self.ended, self.due = False, False, -math.inf
        self.settings: dict[str, Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        before = read_run_file(Path(args.output_dir)) if state.global_step else {}
        self.started = before.get("started") or _now()
        self.seconds_before = float(before.get("seconds") or 0.0)
        self.clock, self.trains, self.ended = time.monotonic(), True, False
        if self._rows is not None and state.is_world_process_zero:
            self.rows = self._rows()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Write `run.json`, but not too often (`LIVE`, `SHARE`). Outside `train()` write it always, as no end of the run is
        known."""
        if not self.trains or (not self.ended and time.monotonic() > self.due):
            self._write(args, state, model, page=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        self._write(args, state, model, page=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.ended = True
        self._write(args, state, model, page=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        if self.ended:
            self._write(args, state, model, page=True)

    def _write(self, args: TrainingArguments, state: TrainerState, model: Any, *, page: bool) -> None:
        """Write `run.json`, and the page if `page`. Errors do not stop the run, whose model may be saved after this."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        with not_fatal("The report"):
            start = time.monotonic()
            if page or self.settings is None:
                self.settings = self.describe(args, model)
            write(json.dumps(self.record(state), indent=1, default=str), folder / RUN_FILE)
            self.due = time.monotonic() + max(LIVE, (time.monotonic() - start) / SHARE)
            if page:
                logger.info(f"The report was written to {write_report(folder)}.")

    def record(self, state: TrainerState) -> dict[str, Any]:
        """The content of `run.json`."""
        return {
            **(self.settings or {}),
            "step": state.global_step,
            "max_steps": state.max_steps,
            "started": self.started,
            "seconds": self.seconds_before + time.monotonic() - self.clock,
            "data": self.data,
            "rows": self.rows,
            "log_history": state.log_history,
        }

    def describe(self, args: TrainingArguments, model: Any) -> dict[str, Any]:
        """The part of `run.json` that does not change during a run."""
        return {
            "method": type(args).__name__.removesuffix("Config"),
            "model": {} if model is None else _describe(model),
            "again": self.again(args, model),
            "versions": versions(),
            "options": args.to_dict(),
            "changed": changed_options(args),
        }

    def again(self, args: TrainingArguments, model: Any) -> dict[str, str]:
        """How to repeat the run: the `trl` command, if it was one, and the beginning of a file for `trl METHOD --config`."""
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        every = args.to_dict()
        options = {option: every[option] for option in changed_options(args)}
        options = {"model_name_or_path": name, **options, "output_dir": args.output_dir}
        made = {"config.yaml": INCOMPLETE + yaml.safe_dump(_plain(options), sort_keys=False, allow_unicode=True)}
        program = Path(sys.argv[0])
        if program.stem == "trl" or program.parent.name == "trl":
            made = {"command": shlex.join(["trl", *sys.argv[1:]]), **made}
        return made


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values for YAML, without those that are not set."""
    return {
        name: json.loads(json.dumps(value, default=str)) for name, value in options.items() if value not in (None, "")
    }


def changed_options(args: TrainingArguments) -> list[str]:
    """Names of options that differ from their defaults, without those whose default (None) is replaced at run time."""
    changed = []
    for field in dataclasses.fields(args):
        if field.name in DERIVED:
            continue
        value = getattr(args, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found_out = default is None and (value is None or isinstance(value, bool))
        if value != default and not found_out and field.init and not field.name.startswith("_"):
            changed.append(field.name)
    return changed


def versions() -> dict[str, str]:
    """Versions of the library and its dependencies, and the Python, system and device of this machine."""
    machine = {"python": platform.python_version(), "system": platform.platform(), "device": _device()}
    return {"trl": __version__, **{name: version_of(name) for name in LIBRARIES}, **machine}


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else platform.machine()


def _describe(model: torch.nn.Module) -> dict[str, Any]:
    trained, parameters = count_parameters(model)
    config = getattr(model, "config", None)  # any module can be trained
    return {
        "class": type(model).__name__,
        "name": getattr(config, "_name_or_path", ""),
        "parameters": parameters,
        "trained": trained,
    }
