"""From rows to questions, and to and from Argilla and Label Studio."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest

from trl.cli.main import main
from trl.errors import DataError
from trl.label.formats import answers_in, export, items_of, read_rows, user_id
from trl.label.session import Session
from trl.label.tasks import Item, pairs_in_rings

ANSWERS = {"rate": 4, "approve": False, "compare": 1, "correct": "Not at all."}


def test_rows_become_questions():
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": "p", "completions": ["b", "c"]}]
    assert [item.completions for item in items_of("rate", rows, "x")] == [("a",), ("b",), ("c",)]
    assert [item.completions for item in items_of("compare", rows, "x")] == [("a", "b"), ("b", "c"), ("c", "a")]
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert items_of("compare", pairs, "x") == [Item("p", ("a", "b"))]


def test_rings_of_two_are_one_pair():
    assert pairs_in_rings(2) == [(0, 1)]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("rate", [{"prompt": "p", "text": "a"}], "x, row 1 has no completion, but .'prompt', 'text'."),
        ("rate", [{"prompt": "p", "completion": 5}], "row 1: expected a text or a list of messages"),
        ("rate", [{"prompt": "p", "completion": "a", "images": ["a.png"]}], "x, row 1 has images"),
        (
            "rate",
            [{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "a"}],
            "row 1 has images",
        ),
        ("compare", [{"prompt": "p", "completion": "a"}], "no prompt with two different completions"),
        ("rate", [{"prompt": "p", "completions": "ab"}], "row 1: completions='ab': give a list"),
        ("rate", [{"prompt": "p", "completions": []}], "row 1: completions=..: give a list"),
        ("rate", [{"prompt": [{"content": "p"}], "completion": "a"}], "row 1: expected a text or a list of messages"),
        ("rate", [{"prompt": [{"role": "user"}], "completion": "a"}], "row 1: expected a text or a list of messages"),
    ],
)
def test_rows_that_cannot_be_asked_about(task, rows, message):
    with pytest.raises(DataError, match=message):
        items_of(task, rows, "x")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_files(tmp_path, name):
    from datasets import Dataset

    rows = [{"prompt": "p", "completion": "a, b"}, {"prompt": "q", "completion": "c\u2028d"}]
    data = Dataset.from_list(rows)
    if name.endswith("json"):
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        writers = {"jsonl": partial(data.to_json, force_ascii=False), "csv": data.to_csv, "parquet": data.to_parquet}
        writers[name.rpartition(".")[2]](str(tmp_path / name))
    assert read_rows(tmp_path / name) == rows


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "ratings.jsonl").write_text("")
    with pytest.raises(DataError, match="Did you mean 'ratings.jsonl'"):
        read_rows(tmp_path / "rating.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        read_rows(tmp_path / "ratings.jsonl")


ROW = {"prompt": "p", "completion": "a"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", json.dumps(ROW), r"a\.json holds .*give a list of rows"),
        ("a.json", json.dumps({"data": [ROW]}), r"a\.json holds .*give a list of rows"),
        ("a.json", "5", r"a\.json holds 5: give a list of rows"),
        ("a.json", json.dumps([ROW, 3]), r"a\.json, row 2: expected an object .*found 3"),
        ("a.json", '[{"prompt": "p", "completion": "\\ud83d"}]', r"a\.json contains half of a character"),
        ("a.jsonl", '["a"]', r"a\.jsonl, row 1: expected an object"),
        ("a.jsonl", '{"prompt": "p"', r"a\.jsonl, line 1, column 15"),
        ("a.jsonl", b'{"prompt": "\xe9"}', r"a\.jsonl, line 1, column 13: the byte 0xe9 is not UTF-8"),
        ("a.csv", "prompt;completion\na;b\n", r"a\.csv, line 1: its columns are separated by ';'"),
        ("a.parquet", "no table", r"a\.parquet' cannot be read as rows"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("rate", {"fields": ROW, "responses": [{"user_id": "u", "value": 4}]}, "row 2: the answers to the task"),
        ("rate", {"fields": ROW, "responses": {"rate": [{"value": 4}]}}, "row 2: the answers to the task.*user_id"),
        ("rate", {"fields": ROW, "responses": {"rate": [{"user_id": "u", "value": 9}]}}, "row 2: 9 is not an answer"),
        ("rate", {"data": ROW, "annotations": [{"result": [{}]}]}, "row 2: the answers to the task"),
        (
            "rate",
            {
                "fields": {"prompt": "p", "completions": ["a", "b"]},
                "responses": {"rate": [{"user_id": "u", "value": 4}]},
            },
            "row 2 has answers, but makes 2 items",
        ),
    ],
)
def test_answers_of_another_form(tmp_path, capsys, task, row, message):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n")
    assert main(["label", str(tmp_path / "a.jsonl"), "--task", task, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("tool", ["argilla", "label_studio"])
@pytest.mark.parametrize("task", ["rate", "approve", "compare", "correct"])
def test_there_and_back(tmp_path, task, tool):
    item = Item("Is it far?", ("No.", "Two hours.") if task == "compare" else ("No.",))
    session = Session(task, tmp_path / "out.jsonl", raters_per_item=2)
    session.add([item])
    session.answer("ada@example.org", item.key, ANSWERS[task])
    (record,) = export(session, tool)
    session.close()
    assert items_of(task, [record], "x") == [item]
    rater = user_id("ada@example.org") if tool == "argilla" else "ada@example.org"
    assert answers_in(task, json.loads(json.dumps(record)), "x") == [(rater, ANSWERS[task])]


def test_what_a_pairwise_tag_of_label_studio_says():
    said = [{"result": [{"value": {"selected": "right"}}], "completed_by": 7}, {"result": [], "was_cancelled": True}]
    assert answers_in("compare", {"data": {}, "annotations": said}, "x") == [("7", 1)]


def test_export_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    item = Item("p", ("a",))
    session = Session("rate", "labels.jsonl")
    session.add([item])
    session.answer("ada", item.key, 5)
    session.close()
    assert main(["label", "--export_to", "tasks.json", "--export_format", "label_studio"]) == 0
    assert "1 records for label_studio are in tasks.json" in capsys.readouterr().out
    (task,) = json.loads((tmp_path / "tasks.json").read_text())
    assert task["annotations"][0]["result"] == [
        {"from_name": "rate", "to_name": "completion", "type": "rating", "value": {"rating": 5}}
    ]
    assert main(["label", "--export_to", "records.jsonl"]) == 0
    (record,) = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert record["responses"] == {"rate": [{"value": 5, "user_id": user_id("ada")}]}
