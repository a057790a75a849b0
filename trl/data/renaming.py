"""Columns under other names: `--dataset_rename question=prompt`, and `rename` or `columns` of an entry of `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl.errors import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows = Dataset | IterableDataset

SAID = ("messages", "prompt", "completion", "chosen", "rejected", "text", "system", "history", "query", "response")
ROLES = (*SAID, "label", "kto_tag", "tools", "images")
"""What a column may hold, as LLaMA-Factory and we call it."""

INSTRUCTED = {"prompt": "instruction", "query": "input", "response": "output"}
"""LLaMA-Factory's words for the columns of an instruction, and how the column is called."""


def pairs_of(rename: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Old name → new name. Raises ConfigError for what is no pair, and for two columns of one name."""
    if rename is None:
        return {}
    if isinstance(rename, Mapping):
        pairs = [(old, new) for old, new in rename.items()]
    else:
        for pair in (rename := [rename] if isinstance(rename, str) else rename):
            if not all(map(str.strip, pair.partition("=")[::2])):
                raise ConfigError(
                    f"dataset_rename: {pair!r} is no pair of names: write old=new, as in question=prompt."
                )
        pairs = [(old.strip(), new.strip()) for old, _, new in (pair.partition("=") for pair in rename)]
    for names in zip(*pairs, strict=True):
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ConfigError(f"dataset_rename: {twice[0]!r} occurs twice: every column has one name.")
    return dict(pairs)


def names_of(columns: Mapping[str, str]) -> dict[str, str]:
    """Old name → new name, of a mapping of what a column holds to its name.

    Raises ConfigError for what no column can hold.
    """
    for role, column in columns.items():
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise ConfigError(
                f"columns: {role!r} is nothing that a column holds.{suggest(role, ROLES)} Known: {known}. Written is what it "
                f"holds first: {{prompt: {column}}}; to keep columns, give a list."
            )
    is_instruction = bool({"query", "response"} & set(columns))
    return {name: INSTRUCTED.get(role, role) if is_instruction else role for role, name in columns.items() if name}


def renamed(rows: Rows, rename: Mapping[str, str] | Sequence[str] | None, path: Any) -> Rows:
    """The rows with columns under other names. Raises DataError for a column that is not there, or a name that is taken."""
    pairs = pairs_of(rename)
    there = (rows.column_names or list(next(iter(rows)))) if pairs else []
    for old, new in pairs.items():
        if old not in there:
            raise DataError(
                f"dataset_rename: dataset {path!r} has no column {old!r}.{suggest(old, there)} Its columns: {', '.join(there)}."
            )
        if new in there and new not in pairs:
            raise DataError(f"dataset_rename: dataset {path!r} has a column {new!r} already: rename that as well.")
    changed = {old: new for old, new in pairs.items() if old != new}
    return rows.rename_columns(changed) if changed else rows
