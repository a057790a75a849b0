"""Logging of rollout batches: metrics and completions.

Completions are written as a table to the terminal, as a parquet file for each log, and as a table to trackers that support it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from trl.algorithms.advantages import group_std, has_no_variance
from trl.data.messages import under_roles
from trl.printable import printable
from trl.rollouts.experience import Group
from trl.training.auxiliary_files import not_fatal
from trl.types import Experience, Metrics

TRACKERS_WITH_TABLES = ("wandb", "trackio")


def rollout_metrics(
    groups: Sequence[Group], experience: Experience, names: Sequence[str], everywhere: Tensor
) -> Metrics:
    """Metrics of a rollout batch, `[N]` each.

    names        names of the reward functions
    everywhere   `[M,1+F]` rewards of all processes, combined and of each function; standard deviations are taken over these
    """
    lengths = torch.tensor([float(len(c)) for group in groups for c in group.example.completions])
    finished = torch.cat([group.finished for group in groups])
    terminated = lengths.masked_fill(~finished, torch.nan)
    rewards = experience.rewards
    deviation = spread(everywhere)
    columns = dict(zip(names, torch.cat([group.rewards for group in groups]).unbind(1), strict=True))
    return {
        "reward": rewards,
        "reward_std": deviation[0].expand_as(rewards),
        "frac_reward_zero_std": has_no_variance(rewards, experience.group).float(),
        "completions/mean_length": lengths,
        "completions/min_length": lengths,
        "completions/max_length": lengths,
        "completions/clipped_ratio": 1 - finished.float(),
        "completions/mean_terminated_length": terminated,
        "completions/min_terminated_length": terminated,
        "completions/max_terminated_length": terminated,
        "failed_rewards": torch.cat([group.failed for group in groups]).float(),
        **{f"rewards/{name}/mean": column for name, column in columns.items()},
        **{f"rewards/{name}/std": deviation[i].expand_as(rewards) for i, name in enumerate(names, 1)},
    }


def spread(columns: Tensor) -> Tensor:
    """Standard deviations `[K]` of the columns `[M,K]`, without NaN."""
    whole = torch.zeros(len(columns), dtype=torch.long)
    return torch.stack([group_std(column, whole)[0] for column in columns.unbind(1)])


class LoggedMetrics:
    """Sums and counts of the numbers that reward functions log by name. Processes may log different names."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: float, count: int = 1) -> None:
        total, known = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(value), known + count)

    def take(self) -> dict[str, tuple[float, int]]:
        """Return and reset sums and counts by name."""
        sums, self.sums = self.sums, {}
        return sums

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(pair) for name, pair in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.sums = {name: (total, int(count)) for name, (total, count) in state.items()}


def means_of(logged: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Means by name, from the sums and counts of several processes."""
    together = LoggedMetrics()
    for sums in logged:
        for name, (total, count) in sums.items():
            together.add(name, total, count)
    return {name: total / count for name, (total, count) in together.sums.items()}


def log_rows(groups: Sequence[Group], experience: Experience, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per completion of a rollout batch, for `CompletionLog`."""
    found = experience.signals.get("advantages", experience.rewards)
    advantages = iter((found if found.dim() == 1 else found.mean(-1)).tolist())
    return [
        {
            "prompt": under_roles(group.row["prompt"]),
            "completion": under_roles(completion),
            **dict(zip(names, group.rewards[i].tolist(), strict=True)),
            **{name: column[i] for name, column in group.extra.items()},
            "advantage": next(advantages),
        }
        for group in groups
        for i, completion in enumerate(group.completions)
    ]


class CompletionLog:
    """Collects rows `{"prompt", "completion", <reward functions>, "advantage"}` between two logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows += map(dict, rows)

    def state_dict(self) -> dict[str, str]:
        return {"rows": json.dumps(self.rows, default=str)}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self.rows = json.loads(state["rows"])

    def take(self) -> list[dict[str, Any]]:
        """Return the rows, and start again without any."""
        rows, self.rows = self.rows, []
        return rows


def write_completions(
    rows: Sequence[Mapping[str, Any]], folder: Path, step: int, *, show: int | None = None, trackers: Sequence[str] = ()
) -> None:
    """Print `show` rows (None: all), and write all rows to `folder` and to those of `trackers` that support tables."""
    if not rows:
        return
    columns = list({name: None for row in rows for name in row})
    rows = [{name: row.get(name) for name in columns} for row in rows]
    with not_fatal("The table of completions"):
        print_completions(rows[:show], step, Console())
    with not_fatal("The file of completions"):
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of([{"step": step, **row} for row in rows]), folder / f"completions_{step:05d}.parquet")
    for name in TRACKERS_WITH_TABLES:
        if name in trackers:
            with not_fatal(f"The table for {name}"):
                tracker = importlib.import_module(name)
                tracker.log({"completions": tracker.Table(dataframe=pd.DataFrame(rows))})


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows with equal keys as an Arrow table; columns of mixed types, or of types that Arrow does not have, become text."""
    return pa.table({name: _arrow([row[name] for row in rows]) for name in rows[0]})


def _arrow(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return pa.array([None if v is None else str(v).encode(errors="replace").decode() for v in values])


def one_per_prompt(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of every prompt."""
    return [*{row["prompt"]: row for row in rows}.values()]


def print_completions(rows: Sequence[Mapping[str, Any]], step: int, console: Console) -> None:
    if not rows:
        return
    table = Table(*map(printable, rows[0]), title=f"Step {step}", show_lines=True)
    for row in rows:
        table.add_row(*(Text(f"{v:.2f}" if isinstance(v, float) else printable(str(v))) for v in row.values()))
    console.print(table)
