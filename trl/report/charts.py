"""What the page's script needs to draw a chart with uPlot, and the words for those who cannot see it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trl.report.metrics import Chart, Point, hint, is_smoothed, smoothed, thinned

COLOURS = 8
"""The page has so many colours of lines; further lines begin again."""

MAIN = 8
"""So many charts are shown at once; the others are folded."""


def chart_data(chart: Chart) -> dict[str, Any]:
    """Lines over common steps, as uPlot takes them: a value or null for every step, and the smooth lines behind the others."""
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
    """All charts as JSON that may stand in a script element: nothing in it can close that."""
    return json.dumps([chart_data(chart) for chart in charts], separators=(",", ":")).replace("<", "\\u003c")


def describe(chart: Chart) -> str:
    """`loss: train from 4.63 at step 1 to 0.348 at step 120. Should fall.`"""
    told = [
        f"{s.label} from {number(s.points[0][1])} at step {s.points[0][0]:,.0f} "
        f"to {number(s.points[-1][1])} at step {s.points[-1][0]:,.0f}"
        for s in chart.series
        if s.points
    ]
    return f"{chart.name}: {'; '.join(told)}. {hint(chart.name)}".strip()


def number(value: float) -> str:
    """Four significant digits, in the shortest way that people read: 12,345 and 1.2M, 0.003, 2.5e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.4g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.3g}"
