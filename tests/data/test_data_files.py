"""Files as people have them: what is in them arrives, or an error says in a line what to do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

from trl.data.mixtures import DatasetMixtureConfig, get_dataset
from trl.data.sources import ScriptArguments, load_rows, take_split
from trl.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ä", "completion": "d"}]
LINES = "\n".join(json.dumps(row) for row in ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rows.JSONL", LINES, ROWS),
        ("rows.ndjson", LINES, ROWS),
        ("bom.jsonl", "\ufeff" + LINES, ROWS),
        ("crlf.jsonl", LINES.replace("\n", "\r\n"), ROWS),
        ("gaps.jsonl", LINES.replace("\n", "\n\n"), ROWS),
        ("bom.csv", "\ufeffprompt,completion\na,b\n", ROWS[:1]),
        ("words.csv", "prompt,completion\nNA,None\nnull,\n", [{"NA": "None"}, {"null": None}]),
        ("quotes.csv", 'prompt,completion\r\na,"b, ""c"""\r\n', [{"a": 'b, "c"'}]),
    ],
)
def test_they_arrive(name, text, expected):
    Path(name).write_text(text, encoding="utf-8", newline="")
    pairs = [(row["prompt"], row["completion"]) for row in load_rows(name)]
    assert pairs == [tuple(row.values()) if len(row) == 2 else next(iter(row.items())) for row in expected]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("long.csv", "prompt,completion\na,b,c\n", "the first row has 3 cells, but the header 2"),
        ("ends.csv", "prompt,completion\na,b,\n", "do not end lines with ','"),
        ("twice.csv", "prompt,prompt\na,b\n", "line 1: the column 'prompt' occurs twice"),
        ("commas.jsonl", LINES.replace("\n", ",\n"), "line 1, column 35: Extra data"),
        ("half.jsonl", LINES + '\n{"prompt": "\\ud83d"}', r"line \d: \\ud83d is half of a character"),
        ("empty.jsonl", "", "it has no rows"),
        ("blank.jsonl", "\n\n", "it has no rows"),
        (
            "inside.json",
            json.dumps({"version": 1, "data": ROWS}),
            "a single row, with a list of rows in 'data': write only that list",
        ),
        ("plain.jsonl.gz", LINES, "Not a gzipped file"),
    ],
)
def test_they_are_named(name, text, words):
    Path(name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}.*{words}"):
        load_rows(name)


def test_the_file_of_a_folder_that_breaks_is_named():
    Path("rows").mkdir()
    for name, text in {"a.jsonl": LINES, "b.jsonl": '{"prompt": "a"'}.items():
        Path("rows", name).write_text(text)
    with pytest.raises(DataError, match=r"rows/b.jsonl, line 1, column 15"):
        load_rows("rows")


def test_files_of_another_kind_in_a_folder_are_said(caplog):
    Path("rows").mkdir()
    for name, text in {"a.jsonl": LINES, "b.csv": "prompt,completion\na,b\n", "notes.txt": "Hi"}.items():
        Path("rows", name).write_text(text)
    with caplog.at_level(logging.WARNING, "trl"):
        assert len(load_rows("rows")) == 2
    assert "only the json files are read, but not b.csv" in caplog.text


def test_columns_beside_images_are_read_and_not_missed(caplog):
    Path("pictures").mkdir()
    Image.new("RGB", (4, 4)).save("pictures/a.png")
    Path("pictures", "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "What?", "completion": "Red."}')
    with caplog.at_level(logging.WARNING, "trl"):
        assert load_rows("pictures")[0]["completion"] == "Red."
    assert caplog.text == ""


@pytest.mark.parametrize("split", ["train[5:]", "train[:10%]", "train[:0]"])
def test_slices_without_rows(split):
    with pytest.raises(DataError, match=r"selects none of its 2 rows"):
        take_split({"train": Dataset.from_list(ROWS)}, split, "rows.jsonl")


def test_endings_of_arguments():
    Path("rows.JSONL").write_text(LINES)
    assert ScriptArguments(dataset_name="rows.JSONL").dataset_name == "rows.JSONL"


def test_files_of_several_kinds_mix():
    Path("a.jsonl").write_text(LINES)
    Path("b.csv").write_text("prompt,completion\nc,d\n")
    long = pa.table({"prompt": pa.array(["e"], pa.large_string()), "completion": pa.array(["f"], pa.large_string())})
    pq.write_table(long, "c.parquet")
    mixture = DatasetMixtureConfig(datasets=[{"path": path} for path in ("a.jsonl", "b.csv", "c.parquet")])
    assert get_dataset(mixture)["train"]["prompt"][:] == ["a", "ä", "c", "e"]
