"""A trial: the script's `main` with the settings of one row, and what it reported."""

from __future__ import annotations

import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl.errors import ConfigError
from trl.sweep.reporting import listening, numbers


@dataclass
class Trial:
    """A row of the table: its settings, all that it reported, and why it failed, if it did."""

    number: int
    settings: Mapping[str, Any]
    reports: list[dict[str, float]] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    def value(self, metric: str) -> float | None:
        """The metric as it was reported last."""
        return next((report[metric] for report in reversed(self.reports) if metric in report), None)

    @property
    def metrics(self) -> set[str]:
        """Names of all that was reported."""
        return {name for report in self.reports for name in report}


def run_trial(script: Path, settings: Mapping[str, Any], hear: Callable[[dict[str, float]], Any]) -> None:
    """Run `main(settings)` of the script; `hear` is told what it reports, and last what it returns."""
    main = main_of(script)
    with listening(hear):
        result = main(dict(settings))
    found = metrics_of(result)
    if found:
        hear(found)


def tried(trial: Trial, script: Path) -> Trial:
    """The trial once it has run: a script that raises is a trial that failed."""
    start = time.perf_counter()
    try:
        run_trial(script, trial.settings, trial.reports.append)
    except Exception as error:  # a script may raise anything; the next trial is not to suffer from it
        trial.error = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    trial.seconds = time.perf_counter() - start
    return trial


def main_of(script: Path) -> Callable[[dict[str, Any]], Any]:
    """The function `main` of a script. What stands beside the script can be imported by it."""
    if str(script.parent) not in sys.path:
        sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location(f"sweep_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "main", None)):
        raise ConfigError(
            f"{script.name} has no function main(hparams): the sweep calls it with the settings of each trial."
        )
    return module.main


def metrics_of(result: Any) -> dict[str, float]:
    """Metrics of what `main` returned: a mapping, or a trainer, whose log it is; else none."""
    if isinstance(result, Mapping):
        return numbers(result)
    trainer = getattr(result, "trainer", result)
    history = getattr(getattr(trainer, "state", None), "log_history", ())
    return {name: value for row in history for name, value in numbers(row).items()}
