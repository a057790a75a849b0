"""Compare the trials of a sweep: a table in the terminal, and an HTML page with their curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console

from trl.counts import counted
from trl.report.charts import number
from trl.report.metrics import Chart, Series, grouped
from trl.report.page import REPORT_FILE, Table, duration, render_page, write
from trl.report.record import RunRecord
from trl.sweep.plan import Plan, Tuning
from trl.sweep.trial import Trial


def ranked(trials: Sequence[Trial], tuning: Tuning) -> list[Trial]:
    """Trials from best to worst; those that failed, or did not report the metric, last."""
    sign = -1 if tuning.mode == "max" else 1

    def place(trial: Trial) -> tuple[bool, float, int]:
        value = None if trial.error else trial.value(tuning.metric)
        return value is None, 0.0 if value is None else sign * value, trial.number

    return sorted(trials, key=place)


def best_of(trials: Sequence[Trial], tuning: Tuning) -> Trial | None:
    """The best trial; None if no trial reported the metric."""
    first = ranked(trials, tuning)[0]
    return None if first.error or first.value(tuning.metric) is None else first


def rows_of(trials: Sequence[Trial], tuning: Tuning) -> list[list[str]]:
    """Number, settings and metric of every trial, from best to worst."""
    return [
        [str(trial.number), *map(_shown, trial.settings.values()), _outcome(trial, tuning.metric)]
        for trial in ranked(trials, tuning)
    ]


def heading(trials: Sequence[Trial], tuning: Tuning) -> list[str]:
    return ["trial", *trials[0].settings, tuning.metric]


def print_table(trials: Sequence[Trial], tuning: Tuning) -> None:
    table = rich.table.Table(*heading(trials, tuning))
    for row in rows_of(trials, tuning):
        table.add_row(*row)
    Console().print(table)


def write_page(trials: Sequence[Trial], plan: Plan, folder: Path) -> Path:
    """Write the page of the sweep as one self-contained HTML file. Return its path."""
    judged, order = plan.tuning.metric, "highest" if plan.tuning.mode == "max" else "lowest"
    others = sorted({name for trial in trials for name in trial.metrics} - {judged})
    told = [f"{counted(len(trials), 'trial')}, {order} {judged} first", "curves by the number of the report"]
    page = render_page(
        RunRecord(name=plan.script.name),
        {"Judged by": [chart_of(judged, trials)], **grouped(chart_of(name, trials) for name in others)},
        eyebrow="Sweep",
        facts=[*told, f"{duration(sum(trial.seconds for trial in trials))} of trials"],
        table=Table(
            "Trials",
            heading(trials, plan.tuning),
            rows_of(trials, plan.tuning),
            best_of(trials, plan.tuning) is not None,
        ),
    )
    return write(page, folder / REPORT_FILE)


def chart_of(metric: str, trials: Sequence[Trial]) -> Chart:
    """The chart of a metric: one curve per trial, with the number of the report on the x axis."""
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
