"""`trl eval --pope` and `--chair`: hallucinated objects in answers and in captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl.cli.evaluation.arguments import EvalArguments
from trl.errors import ConfigError, DataError


def check_objects(arguments: EvalArguments, rows: Any) -> None:
    """Check the object file and the columns before sampling. Raises ConfigError, DataError."""
    _names(arguments)
    for asked, option, column in ((arguments.pope, "pope", "label"), (arguments.chair, "chair", "objects")):
        if asked and column not in rows.column_names:
            raise DataError(f"--{option} needs a column {column!r}, but the dataset has {rows.column_names}.")


def object_scores(arguments: EvalArguments, rows: Any, completions: Sequence[Any]) -> dict[str, float]:
    """The requested POPE and CHAIR scores by name, over the rows whose `label` or `objects` is not None."""
    from trl.rewards.hallucination import chair_scores, pope_scores

    found: dict[str, float] = {}
    if arguments.pope:
        answers, labels = _of_rows(completions, rows["label"], "label")
        found |= {f"POPE {name}": value for name, value in pope_scores(answers, labels).as_dict().items()}
    if arguments.chair:
        captions, objects = _of_rows(completions, rows["objects"], "objects")
        scores = chair_scores(captions, objects, _names(arguments))
        found |= {name.replace("chair", "CHAIR"): value for name, value in scores.as_dict().items()}
    return found


def _of_rows(completions: Sequence[Any], column: Sequence[Any], name: str) -> tuple[list[Any], list[Any]]:
    pairs = [(text, value) for text, value in zip(completions, column, strict=True) if value is not None]
    if not pairs:
        raise DataError(f"The column {name!r} is None in all rows.")
    texts, values = zip(*pairs, strict=True)
    return list(texts), list(values)


def _names(arguments: EvalArguments) -> Any:
    """The objects to look for: a list of names, or lists of synonyms by name."""
    if arguments.chair is None:
        return []
    try:
        names = json.loads(Path(arguments.chair).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"chair={arguments.chair!r} is not a JSON file: {error}.") from error
    lists = list(names.values()) if isinstance(names, dict) else [names]
    if not names or not all(isinstance(own, list) and all(isinstance(n, str) for n in own) for own in lists):
        raise ConfigError(
            f"chair={arguments.chair!r} holds {type(names).__name__}: give a list of names, or lists of synonyms by name, "
            '{"dog": ["puppy"], "cat": []}.'
        )
    return names
