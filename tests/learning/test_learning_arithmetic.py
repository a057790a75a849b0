"""Arithmetic from a verifier: the example's task, and that GRPO learns it from noisy examples."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "arithmetic"))

import problems


def the_run():
    """`run.py` of this example; another example has a file of that name."""
    spec = importlib.util.spec_from_file_location("arithmetic_run", Path(problems.__file__).with_name("run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_questions_and_the_verifier():
    assert len(problems.PROBLEMS) == 200
    assert (problems.PROBLEMS["7+5="], problems.PROBLEMS["7*5="], problems.PROBLEMS["0*9="]) == ("12", "35", "0")
    assert problems.is_right(["12", "12 ", "3", ""], ["12", "12", "12", "12"]) == [1, 0, 0, 0]


def test_examples_are_noisy():
    rows = problems.noisy_rows()
    right = sum(problems.PROBLEMS[row["prompt"]] == row["completion"] for row in rows) / len(rows)
    assert 0.33 < right < 0.37
    assert all(abs(int(problems.PROBLEMS[row["prompt"]]) - int(row["completion"])) <= 2 for row in rows)


def test_the_tokenizer_has_a_token_for_every_character():
    tokenizer = problems.make_tokenizer()
    ids = tokenizer("7*5=35")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "7*5=35"
    assert tokenizer.pad_token_id not in ids


@pytest.mark.long
def test_a_verifier_teaches_what_noisy_examples_do_not():
    run = the_run()
    model = run.imitate()
    assert 0.2 < problems.accuracy(model) < 0.4
    run.learn(model)
    assert problems.accuracy(model) >= 0.9
