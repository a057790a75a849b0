"""What trials of a sweep have come to, side by side: a table, and a page with their curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from trl.report.charts import COLOURS, as_script, describe, number
from trl.report.metrics import Chart, Series
from trl.report.page import REPORT_FILE, asset, duration
from trl.sweep.plan import Plan, Tuning
from trl.sweep.trial import Trial


def ranked(trials: Sequence[Trial], tuning: Tuning) -> list[Trial]:
    """Trials from the best to the worst; those that reported nothing, or failed, last."""
    sign = -1 if tuning.mode == "max" else 1

    def place(trial: Trial) -> tuple[bool, float, int]:
        value = None if trial.error else trial.value(tuning.metric)
        return value is None, 0.0 if value is None else sign * value, trial.number

    return sorted(trials, key=place)


def best_of(trials: Sequence[Trial], tuning: Tuning) -> Trial | None:
    """The best trial; None where none reported the metric."""
    first = ranked(trials, tuning)[0]
    return None if first.error or first.value(tuning.metric) is None else first


def rows_of(trials: Sequence[Trial], tuning: Tuning) -> list[list[str]]:
    """Number, settings and metric of every trial, from the best to the worst."""
    return [
        [str(trial.number), *map(_shown, trial.settings.values()), _outcome(trial, tuning.metric)]
        for trial in ranked(trials, tuning)
    ]


def heading(trials: Sequence[Trial], tuning: Tuning) -> list[str]:
    return ["trial", *trials[0].settings, tuning.metric]


def print_table(trials: Sequence[Trial], tuning: Tuning) -> None:
    table = Table(*heading(trials, tuning))
    for row in rows_of(trials, tuning):
        table.add_row(*row)
    Console().print(table)


def write_page(trials: Sequence[Trial], plan: Plan, folder: Path) -> Path:
    """Write the page of the sweep, one file that needs nothing beside itself, and give its place."""
    environment = Environment(
        loader=PackageLoader("trl.sweep", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = sorted(
        {name for trial in trials for name in trial.metrics}, key=lambda name: (name != plan.tuning.metric, name)
    )
    charts = [chart for chart in (chart_of(name, trials) for name in names) if any(s.points for s in chart.series)]
    best = best_of(trials, plan.tuning)
    page = environment.get_template("page.html").render(
        script=plan.script.name,
        tuning=plan.tuning,
        heading=heading(trials, plan.tuning),
        rows=rows_of(trials, plan.tuning),
        best=None if best is None else str(best.number),
        seconds=duration(sum(trial.seconds for trial in trials)),
        charts=[(chart.name, describe(chart)) for chart in charts],
        data=Markup(as_script(charts)),
        script_code=asset("vendor/uPlot.iife.min.js") + Markup("\n") + asset("page.js"),
        legend=[(i % COLOURS, f"trial {trial.number}") for i, trial in enumerate(trials)],
        style=asset("vendor/uPlot.min.css") + asset("page.css"),
    )
    path = folder / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def chart_of(metric: str, trials: Sequence[Trial]) -> Chart:
    """A metric of all trials, by the number of the report."""
    series = tuple(
        Series(
            f"trial {t.number}",
            tuple((float(i), report[metric]) for i, report in enumerate(t.reports) if metric in report),
        )
        for t in trials
    )
    return Chart(metric, series)


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _outcome(trial: Trial, metric: str) -> str:
    value = trial.value(metric)
    return f"failed: {trial.error}" if trial.error else "not reported" if value is None else number(value)
