"""Rows of a plain list, which a data collator of one's own reads as they are: conversations with images, for example.

listed = ListedRows()
dataset = listed.dataset([[{"role": "user", "content": …}, …], …])      a Dataset of the rows' positions in the list
collate = listed.looking_up(collate)                                    is called with positions, and passes on the rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from trl.types import Example

POSITION = "position_in_list"
"""Column of a dataset that stands for a list."""


class ListedRows:
    """Rows of any type, and their positions as datasets. Several lists can be added: their positions follow one another."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def dataset(self, rows: Any) -> Any:
        """A Dataset of positions for a list, or for each list of a dict; anything else is returned unchanged."""
        if type(rows) is dict:
            return {name: self.dataset(each) for name, each in rows.items()}
        if not isinstance(rows, list):
            return rows
        start = len(self.rows)
        self.rows += rows
        return Dataset.from_dict({POSITION: list(range(start, len(self.rows)))})

    def looking_up(self, collate: Callable[[Sequence[Any]], list[Example]]) -> Callable[[Sequence[Any]], list[Example]]:
        """`collate` for datasets that stand for lists, and for others."""
        return lambda rows: collate([self.rows[row[POSITION]] if POSITION in row else row for row in rows])
