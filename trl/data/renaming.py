"""Rename columns: `--dataset_rename question=prompt`, and `rename` or `columns` in an entry of `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trl.errors import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows = Dataset | IterableDataset

SAID = ("messages", "prompt", "completion", "chosen", "rejected", "text", "system", "history", "query", "response")
ROLES = (*SAID, "label", "kto_tag", "tools", "images")
"""Roles of columns in a mapping `columns`: those of LLaMA-Factory, and the names of columns here."""

INSTRUCTED = {"prompt": "instruction", "query": "input", "response": "output"}
"""Roles of LLaMA-Factory in rows of instructions → name of the column here."""


def pairs_of(rename: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """Old name → new name. Raises ConfigError for a text that is not a pair, and for a name that occurs twice."""
    if rename is None:
        return {}
    if isinstance(rename, Mapping):
        pairs = [(old, new) for old, new in rename.items()]
    else:
        for pair in (rename := [rename] if isinstance(rename, str) else rename):
            if not all(map(str.strip, pair.partition("=")[::2])):
                raise ConfigError(
                    f"dataset_rename: {pair!r} is not a pair of names: write old=new, as in question=prompt."
                )
        pairs = [(old.strip(), new.strip()) for old, _, new in (pair.partition("=") for pair in rename)]
    for names in zip(*pairs, strict=True):
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ConfigError(f"dataset_rename: {twice[0]!r} occurs twice: give every old and every new name once.")
    return dict(pairs)


def names_of(columns: Mapping[str, str]) -> dict[str, str]:
    """Old name → new name, from a mapping of roles to names of columns. Raises ConfigError for an unknown role."""
    for role, column in columns.items():
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise ConfigError(
                f"columns: unknown role {role!r}.{suggest(role, ROLES)} Known roles: {known}. The role is written first: "
                f"{{prompt: {column}}}; to keep only some columns, give a list of their names."
            )
    is_instruction = bool({"query", "response"} & set(columns))
    return {name: INSTRUCTED.get(role, role) if is_instruction else role for role, name in columns.items() if name}


def renamed(rows: Rows, rename: Mapping[str, str] | Sequence[str] | None, path: Any) -> Rows:
    """The rows with renamed columns. Raises DataError if a column does not exist, or its new name does already."""
    pairs = pairs_of(rename)
    there = (rows.column_names or list(next(iter(rows)))) if pairs else []
    for old, new in pairs.items():
        if old not in there:
            raise DataError(
                f"dataset_rename: dataset {path!r} has no column {old!r}.{suggest(old, there)} Its columns: {', '.join(there)}."
            )
        if new in there and new not in pairs:
            raise DataError(f"dataset_rename: dataset {path!r} already has a column {new!r}: rename that one as well.")
    changed = {old: new for old, new in pairs.items() if old != new}
    return rows.rename_columns(changed) if changed else rows
