"""What is logged of a round: its numbers, and its completions as a table in the terminal and a parquet file per log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl.algorithms.advantages import group_std, has_no_variance
from trl.rollouts.experience import Group
from trl.types import Experience, Metrics


def round_metrics(groups: Sequence[Group], experience: Experience, names: Sequence[str]) -> Metrics:
    """Numbers of a round, `[N]` each; `names` are those of the reward functions."""
    lengths = torch.tensor([float(len(c)) for group in groups for c in group.example.completions])
    finished = torch.cat([group.finished for group in groups])
    rewards = experience.rewards
    whole = torch.zeros_like(experience.group)
    columns = dict(zip(names, torch.cat([group.rewards for group in groups]).unbind(1), strict=True))
    return {
        "reward": rewards,
        "reward_std": group_std(rewards, whole)[:1],
        "frac_reward_zero_std": has_no_variance(rewards, experience.group).float(),
        "completions/mean_length": lengths,
        "completions/min_length": lengths,
        "completions/max_length": lengths,
        "completions/clipped_ratio": 1 - finished.float(),
        "completions/mean_terminated_length": lengths.masked_fill(~finished, torch.nan),
        "failed_rewards": torch.cat([group.failed for group in groups]).float(),
        **{f"rewards/{name}/mean": column for name, column in columns.items()},
        **{f"rewards/{name}/std": group_std(column, whole)[:1] for name, column in columns.items()},
    }


def log_rows(groups: Sequence[Group], experience: Experience, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each completion of a round."""
    credit = experience.signals.get("advantages", experience.rewards)
    advantages = iter((credit if credit.dim() == 1 else credit.mean(-1)).tolist())
    return [
        {
            "prompt": as_text(group.row["prompt"]),
            "completion": as_text(completion),
            **dict(zip(names, group.rewards[i].tolist(), strict=True)),
            **{name: column[i] for name, column in group.extra.items()},
            "advantage": next(advantages),
        }
        for group in groups
        for i, completion in enumerate(group.completions)
    ]


class CompletionLog:
    """Rows `{"prompt", "completion", <reward functions>, "advantage"}` since the last log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows += map(dict, rows)

    def state_dict(self) -> dict[str, str]:
        return {"rows": json.dumps(self.rows, default=str)}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self.rows = json.loads(state["rows"])

    def flush(
        self, folder: Path, step: int, *, show: int | None = None, unique: bool = False, console: Console | None = None
    ) -> list[dict[str, Any]]:
        """Print `show` rows (None: all), write all to `folder`, and forget them. With `unique`, one row per prompt."""
        rows, self.rows = self.rows, []
        if unique:
            rows = [*{row["prompt"]: row for row in rows}.values()]
        if rows:
            print_completions(rows[:show], step, console or Console())
            folder.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist([{"step": step, **row} for row in rows])
            pq.write_table(table, folder / f"completions_{step:05d}.parquet")
        return rows


def print_completions(rows: Sequence[Mapping[str, Any]], step: int, console: Console) -> None:
    if not rows:
        return
    table = Table(*rows[0], title=f"Step {step}", show_lines=True)
    for row in rows:
        table.add_row(*(Text(f"{v:.2f}" if isinstance(v, float) else str(v)) for v in row.values()))
    console.print(table)


def as_text(value: Any) -> str:
    """A prompt or completion as text: a conversation's turns under their roles."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)
