"""Who is asked what, what is kept, and what comes of it; killed and resumed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trl.errors import ConfigError, DataError
from trl.label.session import Session
from trl.label.tasks import Item, check_answer, mark_of, score_of

ITEMS = [Item("Is it far?", (text,)) for text in ("No.", "Two hours.", "Why?")]
PAIR = Item("Is it far?", ("No.", "Two hours."))


@pytest.fixture
def start(tmp_path):
    """`start(task, items, **options)`: a session in the test's folder; the one before is closed first."""
    opened: list[Session] = []

    def make(task="rate", items=ITEMS, name="out.jsonl", **options):
        while opened:
            opened.pop().close()
        session = Session(task, tmp_path / name, **options)
        opened.append(session)
        session.add(items)
        return session

    yield make
    while opened:
        opened.pop().close()


def rows(session):
    return [json.loads(line) for line in session.output.read_text().splitlines()]


# ---- answers and rows ----


@pytest.mark.parametrize(
    ("task", "item", "answer", "form", "row"),
    [
        ("rate", ITEMS[0], 4, None, {"completion": "No.", "score": 0.5}),
        ("rate", ITEMS[0], 2, "label", {"completion": "No.", "label": False}),
        ("approve", ITEMS[0], True, None, {"completion": "No.", "label": True}),
        ("compare", PAIR, 1, None, {"chosen": "Two hours.", "rejected": "No."}),
        ("correct", ITEMS[0], "Not at all.", None, {"chosen": "Not at all.", "rejected": "No."}),
        ("correct", ITEMS[0], "Not at all.", "completions", {"completion": "Not at all."}),
    ],
)
def test_an_answer_is_a_row(start, task, item, answer, form, row):
    session = start(task, [item], form=form)
    session.answer("ada", item.key, answer)
    assert rows(session) == [{"prompt": "Is it far?", **row}]


@pytest.mark.parametrize(
    ("task", "item", "answer", "form"),
    [("compare", PAIR, "tie", None), ("rate", ITEMS[0], 3, "label"), ("correct", ITEMS[0], "No.", None)],
)
def test_what_says_nothing_is_no_row(start, task, item, answer, form):
    session = start(task, [item], form=form)
    session.answer("ada", item.key, answer)
    assert rows(session) == []
    assert session.progress("ada").done == 1


def test_pairs_of_marks_are_one_persons(start):
    session = start(form="pairs", raters_per_item=2)
    for rater, marks in (("ada", (1, 3, 3)), ("bob", (5, 5, 4))):
        for item, mark in zip(ITEMS, marks, strict=True):
            session.answer(rater, item.key, mark)
    pairs = [(row["chosen"], row["rejected"]) for row in rows(session)]
    assert pairs == [("Two hours.", "No."), ("Why?", "No."), ("No.", "Why?"), ("Two hours.", "Why?")]


def test_conversations_stay_conversations(start):
    item = Item([{"role": "user", "content": "Far?"}], ([{"role": "assistant", "content": "No."}],))
    session = start("correct", [item])
    session.answer("ada", item.key, "Not at all.")
    assert rows(session)[0]["chosen"] == [{"role": "assistant", "content": "Not at all."}]


def test_marks_and_scores_are_inverse():
    assert [score_of(mark) for mark in range(1, 6)] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert [mark_of(score_of(mark)) for mark in range(1, 6)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("task", "answer"),
    [("rate", 6), ("rate", True), ("rate", "4"), ("approve", 1), ("compare", 2), ("compare", True), ("correct", " ")],
)
def test_answers_of_another_kind_are_refused(task, answer):
    with pytest.raises(DataError, match="is not an answer to the task"):
        check_answer(task, PAIR if task == "compare" else ITEMS[0], answer)


# ---- who is asked ----


def test_two_people_are_not_asked_the_same(start):
    session = start()
    asked = {rater: session.next(rater) for rater in ("ada", "bob", "eve", "dan")}
    assert len({item.key for item in list(asked.values())[:3]}) == 3
    assert asked["dan"] is None
    assert session.next("ada") == asked["ada"]


def test_everyone_is_asked_until_there_are_answers_enough(start):
    session = start(items=ITEMS[:1], raters_per_item=2)
    key = ITEMS[0].key
    for rater, mark in (("ada", 5), ("bob", 1)):
        assert session.next(rater).key == key
        session.answer(rater, key, mark)
    assert session.next("eve") is None
    progress = session.progress("ada")
    assert (progress.done, progress.total, progress.raters) == (1, 1, {"ada": 1, "bob": 1})
    assert (progress.agreement.share, progress.agreement.alpha) == (0.0, 0.0)


def test_the_second_place_is_as_frequent_as_the_first(start):
    session = start("compare", [PAIR])
    turned = sum(session.order(f"rater {i}", PAIR) == [1, 0] for i in range(400))
    assert 140 < turned < 260


def test_a_pair_given_the_other_way_round_is_the_same_question(start):
    session = start("compare", [PAIR])
    session.answer("ada", PAIR.key, 0)
    session = start("compare", [Item(PAIR.prompt, PAIR.completions[::-1])])
    assert session.progress("ada").left == 0
    assert session.rows()[0]["chosen"] == "No."


# ---- undo, skip ----


def test_undo_takes_back_one_after_the_other(start):
    session = start()
    for item, mark in zip(ITEMS, (1, 2, 3), strict=True):
        session.answer("ada", item.key, mark)
    assert session.undo("ada") == (ITEMS[2], 3)
    assert session.undo("ada") == (ITEMS[1], 2)
    assert [row["score"] for row in rows(session)] == [-1.0]
    session.answer("ada", ITEMS[1].key, 5)
    assert session.next("ada") == ITEMS[2]
    assert [row["score"] for row in rows(session)] == [-1.0, 1.0]


def test_nothing_to_undo(start):
    session = start()
    with pytest.raises(DataError, match="nothing to undo"):
        session.undo("ada")


def test_skipped_items_come_again_when_asked_for(start):
    session = start()
    session.skip("ada", ITEMS[0].key)
    assert session.next("ada") == ITEMS[1]
    assert session.progress("ada").skipped == 1
    session = start()
    assert session.next("ada") == ITEMS[1]
    assert session.revisit("ada") == 1
    assert session.next("ada") == ITEMS[0]


# ---- kept ----


def test_answers_and_undos_survive(start):
    session = start()
    for item in ITEMS:
        session.answer("ada", item.key, 4)
    session.undo("ada")
    session = start()
    assert session.progress("ada").answered == 2
    assert session.next("bob") == ITEMS[2]
    assert session.undo("ada") == (ITEMS[1], 4)


def test_a_text_with_ends_of_lines_of_unicode_is_one_line(start):
    said = "one\u2028two\u2029three\x85"
    session = start("correct")
    session.answer("ada", ITEMS[0].key, said)
    (row,) = start("correct").rows()
    assert row["chosen"] == said
    start("correct").journal.path.unlink()
    assert start("correct").rows() == [row]


def test_a_line_cut_off_by_a_kill_is_dropped(start):
    session = start()
    session.answer("ada", ITEMS[0].key, 4)
    with session.journal.path.open("a") as file:
        file.write('{"event": "answer", "item": "')
    session = start()
    session.answer("ada", ITEMS[1].key, 5)
    assert len(start().rows()) == 2


def test_a_row_of_an_undone_answer_does_not_come_back(start):
    """Killed after the journal's line and before the dataset is written."""
    session = start()
    session.answer("ada", ITEMS[0].key, 4)
    before = session.output.read_text()
    session.undo("ada")
    session.output.write_text(before)
    assert start().rows() == []


def test_answers_that_were_typed_in_a_terminal_are_kept(start, tmp_path):
    (tmp_path / "out.jsonl").write_text(json.dumps({"prompt": "Is it far?", "completion": "No.", "score": 0.5}) + "\n")
    session = start()
    assert session.next("ada") == ITEMS[1]
    session.answer("ada", ITEMS[1].key, 5)
    assert [row["score"] for row in rows(session)] == [0.5, 1.0]


KILLED = """
import os, signal, sys
from trl.label.session import Session
from trl.label.tasks import Item
session = Session("rate", sys.argv[1])
items = [Item("p", (str(i),)) for i in range(50)]
session.add(items)
for item in items:
    session.answer("ada", item.key, 5)
    print(item.completions[0], flush=True)
    if item.completions[0] == "30":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    path = tmp_path / "out.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True)
    assert done.returncode == -9
    session = Session("rate", path)
    assert [row["completion"] for row in session.rows()] == done.stdout.split()
    assert len(done.stdout.split()) == 31
    session.close()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', {}, "line 1 is not a row that the task 'rate' writes"),
        (
            "",
            {"form": "completions"},
            "Unknown form of rows for the task 'rate' 'completions'. Known: score, label, pairs",
        ),
        ("", {"raters_per_item": 0}, "raters_per_item=0"),
    ],
)
def test_refused(start, tmp_path, text, options, message):
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        start(**options)


def test_one_process_writes(start, tmp_path):
    start()
    with pytest.raises(ConfigError, match="being written by another process"):
        Session("rate", tmp_path / "out.jsonl")


def test_a_journal_of_something_else(start, tmp_path):
    (tmp_path / "out.journal.jsonl").write_text('{"some": "thing"}\n')
    with pytest.raises(DataError, match="line 1 is not an event of a journal"):
        start()
