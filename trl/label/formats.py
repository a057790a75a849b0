"""Read items to judge from files, import answers of other tools, and export answers to them.

Rows have `prompt` with `completion`, `completions` (a list), or `chosen` and `rejected`. Records of Argilla 2
(`fields`, `responses`) and tasks of Label Studio (`data`, `annotations`) with fields of these names are read as well. A
conversation is a list of messages.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from trl.data.file_checks import check_letters, where_json_breaks
from trl.data.sources import load_rows
from trl.errors import DataError, suggest_beside
from trl.label.session import Session
from trl.label.tasks import TIE, Answer, Content, Item, check_no_images, pairs_in_rings

Row = Mapping[str, Any]
FIELDS = {
    "rate": ("prompt", "completion"),
    "approve": ("prompt", "completion"),
    "compare": ("prompt", "first", "second"),
    "correct": ("prompt", "completion"),
}
"""Names of an item's fields in other tools. The question there has the name of the task."""


# ---- items ----


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file: JSON lines, a JSON list, CSV or Parquet. Raises DataError if there are none."""
    if not path.is_file():
        raise DataError(f"There is no file {str(path)!r}.{suggest_beside(path)}")
    rows = _read_json(path) if path.suffix in (".json", ".jsonl") else _read_table(path)
    if rows == []:
        raise DataError(f"{path} has no rows.")
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {rows!r:.60}: give a list of rows, or one row per line (.jsonl).")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, row {number}: expected an object with the columns of a row, found {row!r:.60}.")
    return rows


def _read_json(path: Path) -> Any:
    check_letters(str(path))
    if (broken := where_json_breaks(str(path))) is not None:
        raise DataError(broken)
    try:
        with path.open(encoding="utf-8-sig") as file:
            rows = json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file if line.strip()]
        json.dumps(rows, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path} contains half of a character (a lone surrogate, {error.object[error.start]!a}): write the whole character."
        ) from None
    return rows


def _read_table(path: Path) -> list[Row]:
    if path.suffix not in (".csv", ".tsv", ".parquet"):
        raise DataError(f"{path}: give .jsonl, .json, .csv, .tsv or .parquet.")
    return list(load_rows(str(path)))


def items_of(task: str, rows: Iterable[Row], where: str) -> list[Item]:
    """The items to judge in the rows. Raises DataError, with the row, for a row without a completion."""
    found = [_completions(_plain(row), f"{where}, row {number}") for number, row in enumerate(rows, start=1)]
    if task != "compare":
        return [Item(prompt, (each,)) for prompt, completions in found for each in completions]
    items = []
    for _, group in groupby(found, key=lambda pair: _identity(pair[0])):
        members = list(group)
        texts = {_identity(each): each for _, completions in members for each in completions}
        items += [Item(members[0][0], pair) for pair in _pairs(list(texts.values()))]
    if not items:
        raise DataError(f"{where} has no prompt with two different completions: there is nothing to compare.")
    return items


def _pairs(completions: Sequence[Content]) -> Iterator[tuple[Content, Content]]:
    """Pairs to compare: each completion appears in two of them."""
    count = len(completions)
    return ((completions[i], completions[j]) for i, j in pairs_in_rings(count, count))


def _identity(content: Content) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False)


def _completions(row: Row, where: str) -> tuple[Content, list[Content]]:
    for names in (("completions",), ("chosen", "rejected"), ("first", "second"), ("completion",)):
        if all(name in row for name in names):
            values = row["completions"] if names == ("completions",) else [row[name] for name in names]
            if not isinstance(values, list) or not values:
                raise DataError(f"{where}: completions={values!r:.60}: give a list of one or more.")
            break
    else:
        raise DataError(
            f"{where} has no completion, but {sorted(row)}. A row needs a prompt, and completion, completions (a list), or "
            "chosen and rejected."
        )
    check_no_images(row, where)
    contents = [row.get("prompt") or "", *values]
    for content in contents:
        if not _is_content(content):
            raise DataError(f"{where}: expected a text or a list of messages (role, content), found {content!r:.80}.")
    return contents[0], contents[1:]


def _is_content(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_message, value)))


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list) or bool(value.get("tool_calls"))


def _plain(row: Row) -> Row:
    """The fields of an Argilla record or a Label Studio task; any other row unchanged."""
    for nested in ("fields", "data"):
        if isinstance(row.get(nested), Mapping):
            return row[nested]
    return row


# ---- answers ----


def answers_in(task: str, row: Row, where: str) -> list[tuple[str, Answer]]:
    """The answers in an Argilla record or a Label Studio task, as (rater, answer); empty for any other row.

    Raises DataError for answers in another format, and for unknown choices.
    """
    try:
        return _from_argilla_record(task, row) if "responses" in row else _from_label_studio_task(task, row)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: the answers to the task {task!r} are not in the format of Argilla or Label Studio "
            f"({type(error).__name__}: {error})."
        ) from error


def _from_argilla_record(task: str, row: Row) -> list[tuple[str, Answer]]:
    said = (row["responses"] or {}).get(task) or []
    return [(str(each["user_id"]), _from_argilla(task, each["value"])) for each in said]


def _from_label_studio_task(task: str, row: Row) -> list[tuple[str, Answer]]:
    return [
        (_rater(each.get("completed_by")), value)
        for each in row.get("annotations") or []
        if not each.get("was_cancelled")
        for result in each["result"]
        if (value := _from_label_studio(task, result["value"])) is not None
    ]


def _rater(completed_by: Any) -> str:
    return (
        str(completed_by.get("email") or completed_by.get("id"))
        if isinstance(completed_by, dict)
        else str(completed_by)
    )


_WORDS: dict[str, dict[Answer, str]] = {
    "approve": {True: "good", False: "bad"},
    "compare": {0: "first", 1: "second", TIE: TIE},
}


def _word(task: str, value: Answer) -> Answer:
    """The name of a choice in other tools; marks and texts unchanged."""
    return _WORDS[task][value] if task in _WORDS else value


def _from_argilla(task: str, value: Any) -> Answer:
    if task == "approve":
        return value == "good"
    return {word: place for place, word in _WORDS["compare"].items()}[value] if task == "compare" else value


def _from_label_studio(task: str, value: Mapping[str, Any]) -> Answer | None:
    match task, value:
        case "rate", {"rating": mark}:
            return mark
        case "approve", {"choices": [word]}:
            return word == "good"
        case "compare", {"selected": side}:
            return {"left": 0, "right": 1}[side]
        case "compare", {"choices": [word]}:
            return _from_argilla(task, word)
        case "correct", {"text": text}:
            return text if isinstance(text, str) else "\n".join(text)
    return None


# ---- other tools ----


def export(session: Session, to: str) -> list[dict[str, Any]]:
    """Export all items and answers as Argilla records (`to="argilla"`) or Label Studio tasks."""
    write = _argilla_record if to == "argilla" else _label_studio_task
    return [write(session.task, item, session.answers.get(key, {})) for key, item in session.items.items()]


def write_records(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the records as a JSON list (`.json`, which both tools import), or as JSON lines."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def _fields(task: str, item: Item) -> dict[str, Content]:
    return dict(zip(FIELDS[task], (item.prompt, *item.completions), strict=True))


def _argilla_record(task: str, item: Item, answers: Mapping[str, Answer]) -> dict[str, Any]:
    said = [{"value": _word(task, value), "user_id": user_id(rater)} for rater, value in answers.items()]
    return {
        "id": item.key,
        "fields": _fields(task, item),
        "metadata": {},
        "suggestions": {},
        "responses": {task: said} if said else {},
        "vectors": {},
        "status": "completed" if said else "pending",
        "_server_id": None,
    }


def user_id(rater: str) -> str:
    """The Argilla user id of a rater: the name itself if it is a UUID, else a UUID derived from the name."""
    try:
        return str(uuid.UUID(rater))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, rater))


def _label_studio_task(task: str, item: Item, answers: Mapping[str, Answer]) -> dict[str, Any]:
    annotations = [
        {"result": [_label_studio_result(task, value)], "was_cancelled": False, "completed_by": {"email": rater}}
        for rater, value in answers.items()
    ]
    return {"data": {**_fields(task, item), "key": item.key}, "annotations": annotations}


def _label_studio_result(task: str, value: Answer) -> dict[str, Any]:
    kind, content = {
        "rate": ("rating", {"rating": value}),
        "approve": ("choices", {"choices": [_word(task, value)]}),
        "compare": ("choices", {"choices": [_word(task, value)]}),
        "correct": ("textarea", {"text": [value]}),
    }[task]
    return {"from_name": task, "to_name": FIELDS[task][-1], "type": kind, "value": content}
