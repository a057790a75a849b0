"""The data with which the page's script draws charts by uPlot, and text descriptions of charts for screen readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trl.report.metrics import Chart, Point, hint, is_smoothed, smoothed, thinned

COLOURS = 8
"""Number of line colours on the page; further lines reuse them."""

MAIN = 8
"""Number of charts that are shown at first; the others are folded."""


def chart_data(chart: Chart) -> dict[str, Any]:
    """The lines of a chart over common steps, in the format of uPlot: a value or null for every step; smoothed lines
    come last."""
    lines = [(series.label, False, thinned(series.points)) for series in chart.series]
    if is_smoothed(chart.name):
        smooth = [(series.label, True, smoothed(series.points)) for series in chart.series]
        lines += [line for line in smooth if line[2]]
    steps = sorted({step for _, _, points in lines for step, _ in points})
    return {
        "name": chart.name,
        "steps": steps,
        "lines": [
            {"label": label, "smooth": is_smooth, "values": _aligned(points, steps)}
            for label, is_smooth, points in lines
        ],
    }


def _aligned(points: Sequence[Point], steps: Sequence[float]) -> list[float | None]:
    values = {step: float(f"{value:.9g}") for step, value in points}
    return [values.get(step) for step in steps]


def as_script(charts: Sequence[Chart]) -> str:
    """All charts as JSON for a script element; "<" is escaped, so that nothing in it can close the element."""
    return json.dumps([chart_data(chart) for chart in charts], separators=(",", ":")).replace("<", "\\u003c")


def describe(chart: Chart) -> str:
    """A text such as `loss: train from 4.63 at step 1 to 0.348 at step 120. Should fall.`"""
    told = [
        f"{s.label} from {number(s.points[0][1])} at step {s.points[0][0]:,.0f} "
        f"to {number(s.points[-1][1])} at step {s.points[-1][0]:,.0f}"
        for s in chart.series
        if s.points
    ]
    return f"{chart.name}: {'; '.join(told)}. {hint(chart.name)}".strip()


def number(value: float) -> str:
    """A number with about four significant digits, in a short readable form: 12,345 or 1.2M, 0.003, 2.5e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.3g}"
