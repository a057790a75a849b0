"""Errors that say what, where and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class TrlError(ValueError):
    """Base of the errors that a user can mend: the message names the argument, column or row, and the remedy."""


class ShapeError(TrlError):
    """A tensor has another shape than the formula is for."""


class DataError(TrlError):
    """A dataset, row or conversation that cannot be used as it is."""


class RowError(DataError):
    """A row that cannot be used: `Row 3 of 'eval' (line 4 of chats.jsonl), column 'text': …`

    row       counts from 0, as datasets do; the message counts from 1
    what      how the message goes on
    dataset   "train", "eval", …; empty while it is not known
    place     where the row stands in a file
    """

    def __init__(self, row: int, what: str, dataset: str = "", place: str = "") -> None:
        super().__init__(row, what, dataset, place)
        self.row, self.what, self.dataset, self.place = row, what, dataset, place

    def __str__(self) -> str:
        of = f" of {self.dataset!r}" if self.dataset not in ("", "train") else ""
        return f"Row {self.row + 1}{of}{f' ({self.place})' if self.place else ''}{self.what}"


class ConfigError(TrlError):
    """An option that is unknown, of the wrong type, or at odds with another."""


class ModelNotFoundError(ConfigError, OSError):
    """A name that no model stands for, here or on the hub: an OSError too, which is what `transformers` raises."""


class ModelError(TrlError):
    """A model that cannot do what was asked of it."""


class EngineError(TrlError):
    """A rollout engine that failed: a server that is down or answers nonsense, weights that did not arrive."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?` for the known names nearest to `name`; empty when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def suggest_beside(path: Path) -> str:
    """` Did you mean 'sft.yaml'?` for a file that is not there, of what its folder holds."""
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    return suggest(path.name, [each.name for each in path.parent.iterdir()])


def listed(texts: Sequence[str], shown: int, separator: str = ", ") -> str:
    """The first `shown` texts, and how many more there are."""
    more = f", and {len(texts) - shown} more" if len(texts) > shown else ""
    return separator.join(texts[:shown]) + more


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`Unknown loss_type 'sigmod'. Did you mean 'sigmoid'? Known: …`"""
    known = list(known)
    return f"Unknown {kind} {name!r}.{suggest(name, known)} Known: {', '.join(known)}."
