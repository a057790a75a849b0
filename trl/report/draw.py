"""A chart as inline SVG: its colours come from the page, its numbers are read by the page's script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from trl.report.metrics import Chart, Point, Series, smoothed, thinned

WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 8, 28
COLOURS = 5
"""The page has so many colours of lines; further lines begin again."""


@dataclass(frozen=True)
class Frame:
    """Where values lie on the drawing: [low, high] of steps and values."""

    steps: tuple[float, float]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        low, high = self.steps
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element; empty if it has no point to show."""
    points = [point for series in chart.series for point in series.points]
    if not points:
        return ""
    frame = frame_of(points)
    lines = "".join(_line(series, i % COLOURS, frame) for i, series in enumerate(chart.series))
    data = escape(json.dumps({"x": [LEFT, WIDTH - RIGHT], "series": _data(chart, frame)}))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(describe(chart))}" '
        f'data-chart="{data}">{"".join(_axes(frame))}{lines}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden=""/></svg>'
    )


def describe(chart: Chart) -> str:
    """`loss: train from 4.63 at step 1 to 0.348 at step 120`, for those who cannot see it."""
    told = [
        f"{s.label} from {number(s.points[0][1])} at step {s.points[0][0]:,.0f} "
        f"to {number(s.points[-1][1])} at step {s.points[-1][0]:,.0f}"
        for s in chart.series
        if s.points
    ]
    return f"{chart.name}: {'; '.join(told)}"


def frame_of(points: Sequence[Point]) -> Frame:
    """Room for all points: never empty, and no wider in value than the ticks around them."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    if low == high == 0:
        low, high = -0.04, 1.0
    elif high - low < 1e-9 * max(abs(low), abs(high)):
        low, high = low - abs(low) / 2, high + abs(high) / 2
    else:
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    first, last = min(steps), max(steps)
    return Frame((first, last) if last > first else (first - 1, last + 1), (low, high))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten, at most `most` of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(
        power * factor
        for factor in (1, 2, 5, 10, 20)
        if math.floor(high / (power * factor)) - math.ceil(low / (power * factor)) < most
    )
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


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


def tick(value: float) -> str:
    """A number as it stands beside an axis, where there is room for six characters: 9,000 and 12k."""
    return f"{number(value / 1000)}k" if 10_000 <= abs(value) < 1e6 else number(value)


def _axes(frame: Frame) -> Iterator[str]:
    for value in ticks(*frame.values, most=5):
        y = frame.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick(value)}</text>'
    yield f'<text class="tick" x="{LEFT - 8}" y="{HEIGHT - 8}" text-anchor="end">step</text>'
    for step in ticks(*frame.steps, most=5):
        x = frame.x(step)
        anchor = "end" if x > WIDTH - RIGHT - 20 else "start" if x < LEFT + 20 else "middle"
        if step == int(step):
            yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{tick(step)}</text>'


def _line(series: Series, colour: int, frame: Frame) -> str:
    """A thin line of what was logged and a thick one through it; a few points are marked one by one."""
    smooth = smoothed(series.points)
    kind = "raw" if smooth else "whole"
    drawn = f'<path class="line-{colour} {kind}" d="{_path(thinned(series.points), frame)}"/>'
    if smooth:
        drawn += f'<path class="line-{colour} smooth" d="{_path(smooth, frame)}"/>'
        return drawn
    dots = (f'<circle cx="{frame.x(s):.1f}" cy="{frame.y(v):.1f}" r="2.4"/>' for s, v in series.points)
    return drawn + f'<g class="dots-{colour}">{"".join(dots)}</g>'


def _path(points: Sequence[Point], frame: Frame) -> str:
    return "M" + "L".join(f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in points)


def _data(chart: Chart, frame: Frame) -> list[dict[str, object]]:
    """What the script tells of the points under the pointer."""
    return [
        {
            "label": series.label,
            "points": [[round(frame.x(s), 1), s, number(v)] for s, v in thinned(series.points)],
        }
        for series in chart.series
    ]
