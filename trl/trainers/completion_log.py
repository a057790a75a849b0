"""The log of completions: a table in the terminal, and a parquet file per log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text


class CompletionLog:
    """Rows `{"prompt", "completion", <reward functions>, "advantage"}` since the last log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows += map(dict, rows)

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
