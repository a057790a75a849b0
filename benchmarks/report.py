"""From what the runs measured to ratios and tables. `python benchmarks/report.py RESULT.json` prints them as Markdown.

    ratio = median over repeats of our cost / median over repeats of theirs

The cost of a run is the time of its timed steps (per token that is not padding, where the sides batch differently) or
the largest memory its process ever held.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

Run = Mapping[str, Any]
"""What `worker.py` wrote: `step_seconds`, `losses`, `tokens`, `peak_mib`, …"""

SAME_LOSS = {"cpu": 1e-3, "cuda": 2e-2}
"""Relative gap of losses up to which both sides computed the same thing after a few Adam steps: float32, or bfloat16."""

RATE = 802e12
"""Floating-point operations a second of a product of large matrices in bfloat16, as measured on an H200."""

READABLE = 110
"""Columns of a terminal below which cells would be cut."""


@dataclass(frozen=True)
class Grid:
    """A table: what it shows, its header and its cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def seconds(run: Run, *, per_token: bool) -> float:
    """Time of the timed steps; with `per_token` divided by the tokens in them that are not padding.

    On a GPU it is their median times their number: single steps compile a kernel, or capture a graph, for a size that is new.
    """
    steps = run["step_seconds"]
    whole = sum(steps) if run.get("launches") is None else median(steps) * len(steps)
    return whole / (sum(run["tokens"]) if per_token else 1)


def processor_seconds(run: Run, *, per_token: bool) -> float:
    """As `seconds`, but the processor time of all threads: nearly blind to what else the machine was doing."""
    return sum(run["cpu_seconds"]) / (sum(run["tokens"]) if per_token else 1)


def seconds_per_sample(run: Run, of: str = "step_seconds") -> float:
    """Time of the timed steps (or of their sampling alone) divided by the tokens that were sampled in them."""
    return sum(run[of]) / sum(run["sampled"])


def loss_gap(ours: Run, theirs: Run) -> float:
    """Largest relative difference between the losses of a step."""
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours["losses"], theirs["losses"], strict=True))


def compare(ours: Sequence[Run], theirs: Sequence[Run], *, same_batches: bool, per_token: bool) -> dict[str, Any]:
    """Ratios of ours to theirs: of medians over repeats, and the smallest and largest over pairs of neighbouring runs.

    Returns `time`, `time_range`, `processor`, `memory`, `per_sample` and `sampling` (time per sampled token, of the step
    and of sampling alone; None where nothing is sampled) and `loss_gap` (None where the sides batch differently).
    """
    sampling, samples = partial(seconds_per_sample, of="sampling_seconds"), sum(ours[0]["sampled"])
    wall = partial(seconds, per_token=per_token)
    processor = partial(processor_seconds, per_token=per_token)
    pairs = [wall(a) / wall(b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "time": _ratio(wall, ours, theirs),
        "time_range": [min(pairs), max(pairs)],
        "processor": _ratio(processor, ours, theirs),
        "memory": _ratio(itemgetter("peak_mib"), ours, theirs),
        "per_sample": _ratio(seconds_per_sample, ours, theirs) if samples else None,
        "sampling": _ratio(sampling, ours, theirs) if samples else None,
        "loss_gap": loss_gap(ours[0], theirs[0]) if same_batches else None,
    }


def _ratio(cost: Callable[[Run], float], ours: Sequence[Run], theirs: Sequence[Run]) -> float:
    return median(map(cost, ours)) / median(map(cost, theirs))


def verdict(comparison: Mapping[str, Any], target: Mapping[str, float | None], device: str = "cpu") -> str:
    """`met`, or what was missed."""
    missed = [kind for kind in ("time", "memory") if target[kind] is not None and comparison[kind] > target[kind]]
    if comparison["loss_gap"] is not None and comparison["loss_gap"] > SAME_LOSS[device]:
        missed.append("losses")
    return f"{' and '.join(missed)} missed" if missed else "met"


def ratio_grid(result: Mapping[str, Any]) -> Grid:
    """One row per workload and side that we are compared with."""
    rows = []
    for name, workload in result["workloads"].items():
        for side, comparison in workload["comparisons"].items():
            target = workload["targets"][side]
            low, high = comparison["time_range"]
            rows.append(
                [
                    name + (" (per token)" if workload["per_token"] else ""),
                    side,
                    f"{comparison['time']:.2f} ({low:.2f}–{high:.2f})",
                    _aim(target["time"]),
                    _share(comparison["per_sample"]),
                    _share(comparison["sampling"]),
                    f"{comparison['processor']:.2f}",
                    f"{comparison['memory']:.2f}",
                    _aim(target["memory"]),
                    "batches differ" if comparison["loss_gap"] is None else f"{comparison['loss_gap']:.0e}",
                    verdict(comparison, target, result["settings"].get("device", "cpu")),
                ]
            )
    header = ["workload", "against", "time", "aim", "per sample", "sampling", "cpu", "memory", "aim", "loss gap", ""]
    return Grid("Ours divided by theirs: below 1 we need less", header, rows)


def _share(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _aim(ratio: float | None) -> str:
    return "–" if ratio is None else f"≤ {ratio:.2f}"


OF_THE_CLOCK = ("step_seconds", "sampling_seconds", "prepare_seconds", "time", "time_range", "per_sample", "sampling")
"""What of runs and comparisons is worth nothing on a machine that others use."""


def without_clock(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with processor time, memory, counts and losses alone."""

    def less(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in OF_THE_CLOCK}

    workloads = {
        name: workload
        | {"comparisons": {side: less(each) for side, each in workload["comparisons"].items()}}
        | {"runs": {side: list(map(less, runs)) for side, runs in workload["runs"].items()}}
        for name, workload in result["workloads"].items()
    }
    return {**result, "workloads": workloads}


def cost_grid(result: Mapping[str, Any]) -> Grid:
    """One row per workload and side, of what a busy machine leaves alone: medians over repeats."""
    rows = []
    for name, workload in result["workloads"].items():
        for side, runs in workload["runs"].items():
            steps, gap = len(runs[0]["cpu_seconds"]), workload["comparisons"].get(side, {}).get("loss_gap")
            processor = median(processor_seconds(run, per_token=False) for run in runs) / steps
            memory = median(run["peak_mib"] for run in runs) / 1024
            tokens = f"{sum(runs[0]['tokens']) / steps:,.0f}"
            rows.append([name, side, f"{processor:.1f}", f"{memory:.2f}", tokens, "–" if gap is None else f"{gap:.0e}"])
    header = ["workload", "side", "processor s/step", "peak GiB", "tokens/step", "loss gap"]
    return Grid("Processor time and memory", header, rows)


@dataclass(frozen=True)
class Side:
    """Runs of one side `of` a workload: time and memory by medians, tokens of all timed steps of a run."""

    of: str
    workload: Mapping[str, Any]
    name: str

    @property
    def runs(self) -> Sequence[Run]:
        return self.workload["runs"][self.name]

    @property
    def steps(self) -> int:
        return len(self.runs[0]["step_seconds"])

    @property
    def wall(self) -> float:
        return median(seconds(run, per_token=False) for run in self.runs)

    @property
    def tokens(self) -> int:
        return sum(self.runs[0]["tokens"])

    @property
    def tokens_and_padding(self) -> list[str]:
        padding = 1 - self.tokens / sum(self.runs[0]["positions"])
        return [f"{self.tokens / self.steps:,.0f}", f"{padding:.0%}"]

    @property
    def peak_gib(self) -> float:
        return median(run["peak_mib"] for run in self.runs) / 1024


def sides(result: Mapping[str, Any]) -> list[Side]:
    return [Side(name, workload, side) for name, workload in result["workloads"].items() for side in workload["runs"]]


def measured_grid(result: Mapping[str, Any]) -> Grid:
    """One row per workload and side: medians over repeats, on the machine that ran it."""
    rows = []
    for side in sides(result):
        processor = median(processor_seconds(run, per_token=False) for run in side.runs)
        sampled = sum(sum(run["sampled"]) for run in side.runs) / len(side.runs)
        rows.append(
            [
                side.of,
                side.name,
                f"{side.wall / side.steps:.2f}",
                f"{processor / side.wall:.1f}",
                *side.tokens_and_padding,
                f"{sampled / side.steps:,.0f}",
                f"{side.peak_gib:.2f}",
                f"{median(run['peak_mib'] - run['loaded_mib'] for run in side.runs) / 1024:.2f}",
            ]
        )
    header = ["workload", "side", "s/step", "busy", "tokens/step", "padding", "sampled", "peak GiB", "training"]
    return Grid(
        "Measured here: threads busy, tokens through the model, peak memory and what training added", header, rows
    )


def device_grid(result: Mapping[str, Any]) -> Grid:
    """One row per workload and side, on a GPU. MFU: 6 · parameters · tokens with gradient, over the time and `RATE`."""
    rows = []
    for side in sides(result):
        flops = 6 * side.runs[0]["parameters"] * side.tokens
        sampling = median(sum(run["sampling_seconds"]) for run in side.runs)
        rows.append(
            [
                side.of,
                side.name,
                f"{1e3 * side.wall / side.steps:,.0f}",
                f"{1e3 * sampling / side.steps:,.0f}" if sampling else "–",
                *side.tokens_and_padding,
                f"{flops / side.wall / RATE:.0%}" if "SFT" in side.workload["trainer"] else "–",
                f"{side.runs[0]['launches']:,.0f}",
                f"{side.runs[0]['busy']:.0%}",
                f"{side.peak_gib:.1f}",
            ]
        )
    header = ["workload", "side", "ms/step", "sampling", "tokens", "padding", "MFU", "kernels", "busy", "peak GiB"]
    return Grid("Measured on a GPU: kernels of a step, and the share of it in which the device ran one", header, rows)


def tables(result: Mapping[str, Any]) -> list[Grid]:
    """The tables that the result has the figures for."""
    runs = [run for workload in result["workloads"].values() for side in workload["runs"].values() for run in side]
    if all("step_seconds" in run for run in runs):
        on_gpu = all(run.get("launches") is not None for run in runs)
        return [ratio_grid(result), device_grid(result) if on_gpu else measured_grid(result)]
    return [cost_grid(result)]


def settings_line(result: Mapping[str, Any]) -> str:
    """What was run, in one line."""
    run = result["settings"]
    libraries = " · ".join(
        f"{side}: " + ", ".join(f"{package} {number}" for package, number in versions.items())
        for side, versions in result["versions"].items()
    )
    return (
        f"{run['steps']} steps after {run['warmup']}, {run['repeats']} repeats, seed {run['seed']}, "
        f"{run['threads']} threads of {run['cores']} cores. {libraries}"
    )


def markdown(grid: Grid) -> str:
    """The table with aligned columns."""
    lines = [list(grid.header), *map(list, grid.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"**{grid.title}**", "", text[0], rule, *text[1:]])


def show(grid: Grid) -> None:
    """Print the table with rich where it is installed, as Markdown otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(grid))
        return
    table = Table(*grid.header, title=grid.title)
    for row in grid.rows:
        table.add_row(*row)
    Console(width=max(Console().width, READABLE)).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ratios and tables of what run.py has measured, as Markdown.")
    parser.add_argument("result", type=Path, help="the file that run.py wrote with --out")
    file = parser.parse_args().result
    measured = json.loads(file.read_text())
    if "workloads" not in measured:
        parser.error(
            f"{file} is not of benchmarks/run.py: it has no workloads. See benchmarks/README.md for what wrote it."
        )
    print(*map(markdown, tables(measured)), settings_line(measured), sep="\n\n")
