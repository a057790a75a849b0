"""A trial of a sweep: run the script's `main` with one set of settings, and collect the metrics it reports."""

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
    """The settings of a trial, all its reports, and its error if it failed."""

    number: int
    settings: Mapping[str, Any]
    reports: list[dict[str, float]] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    def value(self, metric: str) -> float | None:
        """The last reported value of the metric."""
        return next((report[metric] for report in reversed(self.reports) if metric in report), None)

    @property
    def metrics(self) -> set[str]:
        """Names of all reported metrics."""
        return {name for report in self.reports for name in report}


def run_trial(script: Path, settings: Mapping[str, Any], hear: Callable[[dict[str, float]], Any]) -> None:
    """Run `main(settings)` of the script; pass the metrics that it reports, and last those it returns, to `hear`."""
    main = main_of(script)
    with listening(hear):
        result = main(dict(settings))
    found = metrics_of(result)
    if found:
        hear(found)


def tried(trial: Trial, script: Path) -> Trial:
    """Run a trial, and fill in its reports and duration. If the script raises, record the error."""
    start = time.perf_counter()
    try:
        run_trial(script, trial.settings, trial.reports.append)
    except Exception as error:  # a script may raise anything; the next trial must still run
        trial.error = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    trial.seconds = time.perf_counter() - start
    return trial


def main_of(script: Path) -> Callable[[dict[str, Any]], Any]:
    """Import a script and return its function `main`. The script may import other files from its folder."""
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
    """The metrics in the result of `main`: a mapping's numbers, or the last logged values of a trainer; else none."""
    if isinstance(result, Mapping):
        return numbers(result)
    trainer = getattr(result, "trainer", result)
    history = getattr(getattr(trainer, "state", None), "log_history", ())
    return {name: value for row in history for name, value in numbers(row).items()}
