"""Exception classes, and helpers that build messages saying what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class TrlError(ValueError):
    """Base class of errors that the user can fix: the message names the argument, column or row, and the remedy."""


class ShapeError(TrlError):
    """A tensor whose shape is not the one that a function declares."""


class DataError(TrlError):
    """A dataset, row or conversation that is malformed."""


class RowError(DataError):
    """A malformed row: `Row 3 of 'eval' (line 4 of chats.jsonl), column 'text': …`

    row       index of the row from 0, as in datasets; the message counts from 1
    what      rest of the message, after row and place
    dataset   name of the dataset: "train", "eval", …; empty if unknown
    place     file and line of the row, if it came from a file
    """

    def __init__(self, row: int, what: str, dataset: str = "", place: str = "") -> None:
        super().__init__(row, what, dataset, place)
        self.row, self.what, self.dataset, self.place = row, what, dataset, place

    def __str__(self) -> str:
        of = f" of {self.dataset!r}" if self.dataset not in ("", "train") else ""
        return f"Row {self.row + 1}{of}{f' ({self.place})' if self.place else ''}{self.what}"


class ConfigError(TrlError):
    """An option that is unknown, of the wrong type, or in conflict with another."""


class MissingPackageError(ConfigError, ImportError):
    """An option that needs a package which is not installed. Also an ImportError, which is what Python raises."""


class ModelNotFoundError(ConfigError, OSError):
    """No model of that name, as a local folder or on the hub. Also an OSError, which is what `transformers` raises."""


class ModelError(TrlError):
    """A model that does not support what a trainer or option needs."""


class EngineError(TrlError):
    """A rollout engine that failed: the server is down, its answer is invalid, or a weight update did not arrive."""


NEARLY = 0.15
"""Difference in similarity within which other names are suggested beside the most similar one."""


def suggest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """` Did you mean 'a' or 'b'?` from the known names most similar to `name`; empty if the similarity of all is below
    `cutoff`."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=cutoff)
    alike = [difflib.SequenceMatcher(None, other, name).ratio() for other in near]
    near = [other for other, ratio in zip(near, alike, strict=True) if ratio > alike[0] - NEARLY]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def suggest_beside(path: Path) -> str:
    """` Did you mean 'sft.yaml'?` from the file names in the same folder, for a file that does not exist."""
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    return suggest(path.name, [each.name for each in path.parent.iterdir()])


def listed(texts: Sequence[str], shown: int, separator: str = ", ") -> str:
    """Join the first `shown` texts; add how many more there are."""
    more = f", and {len(texts) - shown} more" if len(texts) > shown else ""
    return separator.join(texts[:shown]) + more


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """`Unknown loss_type 'sigmod'. Did you mean 'sigmoid'? Known: …`"""
    known = list(known)
    return f"Unknown {kind} {name!r}.{suggest(name, known)} Known: {', '.join(known)}."
