"""A rollout batch, by hand: who takes which prompt, what is logged of it, and the entropy bonus of a step."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from trl.algorithms.entropy_control import EntropyBonus
from trl.callbacks.completions import LoggedMetrics, means_of, spread, write_completions
from trl.errors import DataError
from trl.rollouts.prompts import Prompts
from trl.trainers.entropy_bonus import BonusOfSteps, count_tokens
from trl.types import Batch, Completion, Scores

ROWS = Dataset.from_dict({"prompt": list("abcdefgh")})


def letters(rows):
    return "".join(row["prompt"] for row in rows)


def test_prompts_are_dealt_in_turn():
    processes = [Prompts(ROWS, rank=rank, world=2) for rank in range(2)]
    assert [letters(p.take(2)) for p in processes] == ["ac", "bd"]
    assert [letters(p.deal([1, 3])) for p in processes] == ["e", "fgh"]
    assert [letters(p.deal([0, 1])) for p in processes] == ["", "a"]
    assert [p.cursor for p in processes] == [9, 9]
    assert letters(Prompts(ROWS.to_iterable_dataset(), rank=1, world=2).take(3)) == "bdf"
    assert letters(Prompts(ROWS.to_iterable_dataset()).take(10)) == "abcdefghab"


def test_a_stream_without_rows_is_an_error_and_no_endless_wait():
    with pytest.raises(DataError, match="stream of prompts is empty"):
        Prompts(ROWS.to_iterable_dataset().filter(lambda row: False)).take(1)


HIGH = {"high_entropy": [1.0, 0.0, 1.0, 0.0]}
COMPLETIONS = [Completion([5, 6], signals={"high_entropy": [0.0, 1.0]}), Completion([5, 6, 7, 8], signals=HIGH)]


def test_tokens_that_a_bonus_acts_on():
    muted = Completion([5, 6], mask=[0, 0], signals={"high_entropy": [1.0, 1.0]})
    assert count_tokens([*COMPLETIONS, muted]).item() == 3
    assert count_tokens([Completion([5, 6]), Completion([5], mask=[1])]).item() == 3


WEIGHTS = {"token": [[1 / 3, 1 / 3], [1 / 3, 0.0]], "sequence": [[1 / 4, 1 / 4], [1 / 2, 0.0]]}
ACTING = {
    "all": ({}, 3, (1 + 2 + 6) / 3),
    "high": ({"high_entropy": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}, 2, (2 + 6) / 2),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("acting", ACTING)
def test_a_bonus_is_a_mean_over_its_tokens(weights, acting):
    """Sequences of 2 tokens and 1: whatever a token weighs, the bonus is α times the mean entropy, and so its gradient."""
    signals, count, mean = ACTING[acting]
    entropy = torch.tensor([[1.0, 2.0], [6.0, 0.0]], requires_grad=True)
    weight, none = torch.tensor(WEIGHTS[weights]), torch.zeros(0, dtype=torch.long)
    signals = {**signals, "bonus_tokens": torch.tensor([count, count])}
    batch = Batch({}, none, none, none, (weight > 0).float(), none, none, none, signals, weight)
    steps = BonusOfSteps(EntropyBonus(0.1, target=5.0, step=0.01, entropy=1.0))
    policy_loss = torch.tensor([[2.0, 4.0], [3.0, 0.0]])
    total = (steps(policy_loss, Scores(logprobs=entropy, entropy=entropy), batch) * weight).sum()
    total.backward()
    without = (policy_loss * weight).sum().item()
    assert total.item() == pytest.approx(without - 0.1 * mean)
    assert sorted(entropy.grad.flatten().tolist()) == pytest.approx([-0.1 / count] * count + [0] * (4 - count))
    assert steps.end_step(lambda sums: sums) == pytest.approx({"policy_loss": without, "entropy_coef": 0.11})
    assert (steps.bonus.entropy, steps.bonus.coefficient) == pytest.approx((mean, 0.11))
    again = BonusOfSteps(EntropyBonus(0.1, target=5.0, step=0.01))
    again.load_state_dict(steps.state_dict())
    assert again.bonus == steps.bonus


def test_a_step_without_a_number_moves_no_bonus():
    steps = BonusOfSteps(EntropyBonus(0.1, target=5.0, step=0.01))
    steps.sums = torch.tensor([1.0, math.nan, 3.0])
    steps.end_step(lambda sums: sums)
    assert (steps.bonus.coefficient, steps.sums) == (0.1, None)


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
