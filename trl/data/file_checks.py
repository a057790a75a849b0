"""Check data files before they are read, so that errors name the file, line and remedy, and no column is misread."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from trl.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Column separator of a table, by the file's extension."""

TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
"""Extensions of text files, which have to be UTF-8."""


def check_letters(path: str) -> None:
    """Raise DataError for a text file that is not UTF-8, with the place of the first wrong byte."""
    if not Path(path).is_file() or not path.endswith(TEXTS):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, column {error.start + 1}: the byte {line[error.start]:#04x} is not UTF-8. "
                    f"Convert the file, for instance from Latin-1: iconv -f latin1 -t utf-8 {path}"
                ) from error


def check_table(path: str) -> None:
    """Raise DataError for a table with another separator than its extension says, or with columns that do not fit its header."""
    ending = Path(path).suffix.lower()
    expected = SEPARATORS.get(ending)
    if expected is None or not Path(path).is_file():
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        line = file.readline().rstrip("\r\n")
        file.seek(0)
        rows = csv.reader(file, delimiter=expected)
        header, first = _next(rows), _next(rows)
    found = next((separator for separator in "\t;|," if separator in line), expected)
    if expected not in line and found != expected:
        remedy = "Name it .tsv" if found == "\t" else f"Write it with {expected!r}"
        raise DataError(
            f"{path}, line 1: its columns are separated by {found!r} ({line[:60]!r}), but a {ending} file has to have "
            f'{expected!r}. {remedy}, or load the rows in Python: load_dataset("csv", data_files={path!r}, sep={found!r}).'
        )
    if len(first) > len(header):
        raise DataError(
            f"{path}: the first row has {len(first)} cells, but the header {len(header)}, so that columns would be mixed up. "
            f"Put cells that contain {expected!r} in double quotes, and do not end lines with {expected!r}."
        )
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise DataError(f"{path}, line 1: the column {twice[0]!r} occurs twice. Give every column a name of its own.")


def _next(rows: Iterator[list[str]]) -> list[str]:
    """The next row of a table; empty at its end, and for a row with a cell longer than the limit of `csv`."""
    try:
        return next(rows, [])
    except csv.Error:
        return []


def where_json_breaks(path: str) -> str | None:
    """Place and reason of the first line of a `.jsonl` file that is not valid JSON or Unicode; None if all lines are valid, and
    for other files."""
    if not path.lower().endswith((".jsonl", ".ndjson")):
        return None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                json.dumps(json.loads(line.strip() or "null"), ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])[1:-1]
                return f"{path}, line {number}: {half} is half of a character (a lone surrogate). Write the whole character, or remove it."
            except json.JSONDecodeError as error:
                return f"{path}, line {number}, column {error.colno}: {error.msg}"
    return None
