"""The report page of a run: one self-contained HTML file with its curves, samples, options and versions.

write_report("opt-sft-imdb")        opt-sft-imdb/report.html
"""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from trl import __version__
from trl.errors import DataError
from trl.report.charts import COLOURS, MAIN, as_script, describe, number
from trl.report.metrics import LEADING, Chart, charts_by_group, charts_of_runs, hint
from trl.report.record import RunRecord, read_run

REPORT_FILE = "report.html"
KEY_FIGURES = 5
"""Number of metrics that are shown at the top."""


@dataclass(frozen=True)
class Figure:
    """A metric at the top of the page, with its last value and its first (`before`)."""

    label: str
    value: str
    before: str = ""


@dataclass(frozen=True)
class Table:
    """A table that compares several runs; with `has_best`, the first row is highlighted."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_best: bool = False


def write_report(
    run_folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, refresh: int = 0
) -> Path:
    """Write the page of the run in `run_folder` to `output` (default: `report.html` in that folder), and return its path.

    With `refresh`, browsers reload the page every `refresh` seconds. Raises DataError for a folder without files of a run, and
    instead of replacing an existing page by one without log and samples.
    """
    folder = Path(run_folder).expanduser()
    run = read_run(folder)
    path = folder / REPORT_FILE if output is None else Path(output).expanduser()
    damaged = f" Damaged: {', '.join(run.damaged)}." if run.damaged else ""
    if path.exists() and not (run.log or run.samples):
        raise DataError(
            f"{str(folder)!r} has no log and no samples any more, so that the earlier report {str(path)!r} is not replaced. Give "
            f"another --output.{damaged}"
        )
    return write(render(run, refresh=refresh), path)


def write_comparison(
    run_folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, refresh: int = 0
) -> Path:
    """Write a page with the curves of several runs in the same charts, and the options in which they differ.

    Runs are called by their folders' names, with parent folders if these are equal. Raises DataError as `write_report` does.
    """
    folders = [Path(each).expanduser() for each in run_folders]
    runs = dict(zip(short_names(folders), map(read_run, folders), strict=True))
    return write(render_comparison(runs, refresh=refresh), output)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that are different for all of them."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"The same folder is given twice: {', '.join(map(str, folders))}.")


def write(text: str, output: str | os.PathLike[str]) -> Path:
    """Write a file atomically, and return its path."""
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8", errors="replace")
    os.replace(beside, path)
    return path


def render(run: RunRecord, *, refresh: int = 0) -> str:
    """The page of one run, as HTML."""
    groups = charts_by_group(run.log)
    return render_page(
        run,
        groups,
        figures=list(key_figures(groups)),
        facts=list(facts(run)),
        warnings=list(warnings(run, groups)),
        refresh=refresh,
    )


def render_comparison(runs: Mapping[str, RunRecord], *, refresh: int = 0) -> str:
    """The page of several runs, as HTML."""
    groups = charts_of_runs({name: run.log for name, run in runs.items()})
    told = [f"{name}: {'; '.join(facts(run))}" for name, run in runs.items()]
    rows = [[name, *values] for name, values in differences(runs).items()]
    return render_page(
        RunRecord(name=" · ".join(runs)),
        groups,
        eyebrow="Comparison of runs",
        facts=told,
        table=Table("Options that differ", ["option", *runs], rows) if rows else None,
        refresh=refresh,
    )


def differences(runs: Mapping[str, RunRecord]) -> dict[str, list[str]]:
    """Options whose values differ between runs, with the values of all runs."""
    options = dict.fromkeys(name for run in runs.values() for name in run.options)
    values = {name: [shown(run.options.get(name)) for run in runs.values()] for name in options}
    return {
        name: each for name, each in values.items() if len(set(each)) > 1 and name not in ("output_dir", "run_name")
    }


@cache
def _template() -> Template:
    """The page's template. It is cached, since reading it takes ten times as long as rendering a page."""
    environment = Environment(
        loader=PackageLoader("trl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "shown": shown,
        "breakable": breakable,
        "hint": hint,
        "describe": describe,
        "base64": base64_of,
    }
    return environment.get_template("page.html")


def render_page(run: RunRecord, groups: Mapping[str, Sequence[Chart]], **parts: Any) -> str:
    """Render the page of one or several runs: charts by heading, and the other parts of the page by name."""
    charts = [chart for charts in groups.values() for chart in charts]
    drawn = [chart for chart in charts if not is_flat(chart) and any(series.points for series in chart.series)]
    main = main_charts(drawn)
    rest = {title: [c for c in charts if c in drawn and c not in main] for title, charts in groups.items()}
    empty = {"figures": [], "facts": [], "warnings": [], "table": None, "refresh": 0}
    empty["eyebrow"] = f"{run.method or 'Training'} run"
    return _template().render(
        run=run,
        groups=groups,
        main=main,
        rest={title: charts for title, charts in rest.items() if charts},
        place={chart.name: i for i, chart in enumerate(drawn)},
        flat=[chart for chart in charts if is_flat(chart)],
        charts=Markup(as_script(drawn)),
        extremes=extremes,
        labels=list(dict.fromkeys(series.label for chart in drawn for series in chart.series)),
        colours=COLOURS,
        style=asset("vendor/uPlot.min.css") + asset("page.css"),
        script=asset("vendor/uPlot.iife.min.js") + Markup("\n") + asset("page.js"),
        version=__version__,
        **{**empty, **parts},
    )


def main_charts(charts: Sequence[Chart]) -> list[Chart]:
    """The charts that are shown at first: those of leading metrics, then others in their order."""
    leading = sorted((c for c in charts if c.name in LEADING), key=lambda chart: LEADING.index(chart.name))
    return [*leading, *(chart for chart in charts if chart not in leading)][:MAIN]


def asset(name: str) -> Markup:
    """The content of a style or script file, for inclusion in a page."""
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))


def base64_of(content: bytes) -> str:
    """Bytes as base64 text, for a data URL in the page."""
    return b64encode(content).decode()


# ---- contents of the page ----


def facts(run: RunRecord) -> Iterator[str]:
    """The parts of the line under the title: model, parameters, steps, tokens, duration, start."""
    if name := run.model.get("name") or run.model.get("class") or run.model.get("type"):
        yield str(name)
    if parameters := run.model.get("parameters"):
        trained = run.model.get("trained", parameters)
        share = "" if trained == parameters else f", {number(trained)} trained"
        yield f"{number(parameters)} parameters{share}"
    if run.max_steps:
        yield f"{run.step:,} of {run.max_steps:,} steps"
    elif run.step:
        yield f"{run.step:,} steps"
    if tokens := _last(run.log, "num_tokens"):
        yield f"{number(tokens)} tokens"
    if seconds := _last(run.log, "train_runtime") or run.seconds:
        yield duration(seconds)
    if run.started:
        yield run.started


def warnings(run: RunRecord, groups: Mapping[str, Sequence[Chart]]) -> Iterator[str]:
    """Warnings at the top of the page: missing or damaged files, an unfinished run, values that are not finite."""
    if not run.log:
        yield "No log was found: neither run.json, nor a checkpoint with trainer_state.json, nor log_history.jsonl."
    if run.damaged:
        yield f"Damaged files, whose unreadable parts are left out: {', '.join(run.damaged)}."
    if run.step < run.max_steps:
        yield f"The log ends at step {run.step:,} of {run.max_steps:,}: the run stopped early, or is still running."
    lost = [f"{chart.name} ({chart.lost:,})" for charts in groups.values() for chart in charts if chart.lost]
    if lost:
        yield f"Values that are infinite or not a number, which are not drawn: {', '.join(lost)}."


def key_figures(groups: Mapping[str, Sequence[Chart]]) -> Iterator[Figure]:
    """The first and last values of the leading metrics: of evaluation, if there was one, else of training."""
    leading = [chart for charts in groups.values() for chart in charts if chart.name in LEADING]
    for chart in leading[:KEY_FIGURES]:
        drawn = {series.label: series.points for series in chart.series if series.points}
        label = next((label for label in ("eval", "train", *drawn) if label in drawn), None)
        if label is not None:
            line = drawn[label]
            before = number(line[0][1]) if len(line) > 1 else ""
            name = chart.name if label == "train" else f"{chart.name} ({label})"
            yield Figure(name.replace("_", " "), number(line[-1][1]), before)


def is_flat(chart: Chart) -> bool:
    """True if all values of a metric are displayed as the same number, so that a sentence replaces the chart."""
    values = [value for series in chart.series for _, value in series.points]
    return chart.name not in LEADING and len(values) > 1 and number(min(values)) == number(max(values))


def extremes(chart: Chart) -> Iterator[tuple[str, Sequence[str]]]:
    """For every line of a chart: first and last value, and lowest and highest value with their steps."""
    for series in (series for series in chart.series if series.points):
        lowest = min(series.points, key=lambda point: point[1])
        highest = max(series.points, key=lambda point: point[1])
        placed = [f"{number(value)} at {step:,.0f}" for step, value in (lowest, highest)]
        yield series.label, [number(series.points[0][1]), number(series.points[-1][1]), *placed]


def shown(value: Any) -> str:
    """The value of an option as text for readers."""
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {shown(each)}" for name, each in value.items())
    return str(value)


def breakable(name: str) -> Markup:
    """A metric's name as HTML that allows line breaks after "/" and "_"."""
    return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name))))


def duration(seconds: float) -> str:
    """A duration as text, such as `2 h 5 min`, `3 min 20 s`, `1.7 s`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _last(log: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(log) if name in row), None)
