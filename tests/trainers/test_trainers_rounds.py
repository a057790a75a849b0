"""Parts of a round, by hand: who takes which prompt, and the share of a token's entropy in a step."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from trl.trainers.completion_log import LoggedMetrics, means_of, spread, write_completions
from trl.trainers.entropy_bonus import count_tokens, share
from trl.trainers.prompts import Prompts, StreamRows, TableRows
from trl.types import Completion

ROWS = Dataset.from_dict({"prompt": list("abcdefgh")})


def letters(rows):
    return "".join(row["prompt"] for row in rows)


def test_prompts_are_dealt_in_turn():
    processes = [Prompts(TableRows(ROWS, seed=0, shuffle=False), rank=rank, world=2) for rank in range(2)]
    assert [letters(p.take(2)) for p in processes] == ["ac", "bd"]
    assert [letters(p.deal([1, 3])) for p in processes] == ["e", "fgh"]
    assert [letters(p.deal([0, 1])) for p in processes] == ["", "a"]
    assert [p.cursor for p in processes] == [9, 9]
    assert letters(Prompts(StreamRows(ROWS.to_iterable_dataset()), rank=1, world=2).take(3)) == "bdf"


HIGH = {"high_entropy": [1.0, 0.0, 1.0, 0.0]}
COMPLETIONS = [Completion([5, 6], signals={"high_entropy": [0.0, 1.0]}), Completion([5, 6, 7, 8], signals=HIGH)]


def test_tokens_that_a_bonus_acts_on():
    muted = Completion([5, 6], mask=[0, 0], signals={"high_entropy": [1.0, 1.0]})
    assert count_tokens([*COMPLETIONS, muted]).tolist() == [2, 6, 3]
    assert count_tokens([Completion([5, 6]), Completion([5], mask=[1])]).tolist() == [2, 3, 3]


@pytest.mark.parametrize(
    ("aggregation", "weight", "expected"),
    [
        ("token", 1 / 6, 2),
        ("sequence", 1 / (2 * 2) * 2, 2 / 3),
        ("constant", 1 / (2 * 8), 16 / 3),
        ("sum", 1 / 2, 2 / 3),
    ],
)
def test_a_bonus_is_a_mean_over_its_tokens(aggregation, weight, expected):
    """Two sequences of 2 and 4 tokens, 3 of which count: whatever a token weighs, its share makes that ⅓."""
    found = share(count_tokens(COMPLETIONS), aggregation, 8).item()
    assert found == pytest.approx(expected)
    assert weight * found == pytest.approx(1 / 3)


def test_numbers_that_processes_log():
    one, two = LoggedMetrics(), LoggedMetrics()
    one.add("asked", 1.0)
    two.add("asked", 4.0)
    two.add("asked", 4.0)
    two.add("other", 2)
    two.load_state_dict(two.state_dict())
    assert means_of([one.take(), two.take()]) == {"asked": 3.0, "other": 2.0}
    assert means_of([one.take()]) == {}


def test_spread_leaves_out_what_does_not_apply():
    assert spread(torch.tensor([[1.0, 5.0], [3.0, float("nan")], [5.0, 7.0]])).tolist() == pytest.approx([2, 2**0.5])


def test_columns_of_some_rows_alone(tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c", "note": "x"}]
    write_completions(rows, tmp_path, 3)
    shown = capsys.readouterr().out
    assert "note" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["completions_00003.parquet"]
