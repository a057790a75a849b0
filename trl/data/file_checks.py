"""What keeps a file from being read as rows, found before a reader fails at it or takes one thing for another."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from trl.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What stands between the columns of a table, by the ending of its file."""

TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
"""Endings of files with letters in UTF-8."""


def check_letters(path: str) -> None:
    """Raises DataError for a text file that is not UTF-8: readers take its bytes, and fail at the first row that is looked at."""
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
    """Raises DataError for a table whose columns are separated otherwise than its ending says, or do not fit its header."""
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
            f"{path}, line 1: its columns are separated by {found!r} ({line[:60]!r}), where a {ending} file has "
            f'{expected!r}. {remedy}, or give rows that were read in Python: load_dataset("csv", data_files={path!r}, sep={found!r}).'
        )
    if len(first) > len(header):
        raise DataError(
            f"{path}: the first row has {len(first)} cells, and the header {len(header)}, so that columns would be read for one "
            f"another. Write cells that hold {expected!r} in double quotes, and no {expected!r} at the end of a line."
        )
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise DataError(f"{path}, line 1: the column {twice[0]!r} occurs twice. Give every column a name of its own.")


def _next(rows: Iterator[list[str]]) -> list[str]:
    """The next row of a table; an empty one at its end, and where a cell is longer than `csv` reads."""
    try:
        return next(rows, [])
    except csv.Error:
        return []


def where_json_breaks(path: str) -> str | None:
    """The first line of a `.jsonl` file that is not JSON, or not Unicode; None where there is none, or of other files."""
    if not path.lower().endswith((".jsonl", ".ndjson")):
        return None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                json.dumps(json.loads(line.strip() or "null"), ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])[1:-1]
                return f"{path}, line {number}: {half} is half of a character. Write the whole one, or leave it out."
            except json.JSONDecodeError as error:
                return f"{path}, line {number}, column {error.colno}: {error.msg}"
    return None
