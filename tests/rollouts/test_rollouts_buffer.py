"""A rollout batch, by hand: who takes which prompt, what is logged of it, and the entropy bonus of a step."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from trl.algorithms.entropy_control import EntropyBonus
from trl.callbacks.completions import LoggedMetrics, means_of, spread, write_completions
from trl.errors import DataError
from trl.rollouts.buffer import RolloutBuffer
from trl.rollouts.engine import Rollout
from trl.rollouts.experience import (
    deal_minibatches,
    empty_group,
    example_of,
    finished,
    split_into_minibatches,
    tables_of,
    with_signals,
    without_signals,
)
from trl.rollouts.prompts import Prompts
from trl.trainers.entropy_bonus import BonusOfSteps, count_tokens
from trl.types import Batch, Completion, Example, Scores

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


def buffer_of(names, **options):
    """Rollout batches a, b, … of two minibatches, gone through twice; two of them are an epoch over the prompts."""
    rounds = iter(names)
    as_it_is = {"state_of": list, "batch_from": list}
    options = {"minibatches": 2, "iterations": 2, "per_epoch": 2, **as_it_is, **options}
    return RolloutBuffer(lambda: [f"{name}{k}" for name in next(rounds) for k in range(2)], **options)


def test_minibatches_of_rollout_batches_come_in_turn():
    buffer = buffer_of("abcd")
    assert [*buffer] == ["a0", "a1", "a0", "a1", "b0", "b1", "b0", "b1"]
    assert [*buffer] == ["c0", "c1", "c0", "c1", "d0", "d1", "d0", "d1"]
    assert len(buffer) == 8
    with pytest.raises(TypeError, match="a stream of prompts has no length"):
        len(buffer_of("a", per_epoch=None))
    endless = iter(buffer_of("abc", per_epoch=None, iterations=1))
    assert [next(endless) for _ in range(6)] == ["a0", "a1", "b0", "b1", "c0", "c1"]


def test_epochs_over_a_rollout_batch_may_be_skipped():
    buffer, seen = buffer_of("ab"), []
    for _ in range(3):
        seen.append((buffer.next_minibatch(), buffer.is_new, buffer.is_between_epochs))
    assert seen == [("a0", False, False), ("a1", False, True), ("a0", False, False)]
    buffer.skip_remaining_epochs()
    assert (buffer.is_new, buffer.is_between_epochs) == (True, False)
    buffer.skip_remaining_epochs()
    assert (buffer.next_minibatch(), buffer.served) == ("b0", 4)


@pytest.mark.parametrize("served", [0, 3, 4, 8, 11])
def test_what_is_left_of_a_rollout_batch_is_part_of_a_checkpoint(served):
    """What was trained on before comes as empty minibatches, of the epoch that the checkpoint was written in."""
    whole, resumed = buffer_of("abcdef"), buffer_of("abcdef"[-(-served // 4) :])
    for _ in range(served):
        whole.next_minibatch()
    resumed.load_state(whole.state())
    assert resumed.batch == ([] if served % 4 == 0 else whole.batch)
    skipped = served % 8
    assert [*resumed] == [[]] * skipped + [whole.next_minibatch() for _ in range(8 - skipped)]


def test_the_loader_draws_on_no_random_state():
    before = torch.get_rng_state()
    assert [*buffer_of("ab").loader()][:2] == ["a0", "a1"]
    assert torch.equal(torch.get_rng_state(), before)


# ---- examples of a rollout batch ----

THREE = Example([1, 2], (Completion([10]), Completion([11, 12]), Completion([13])))
TWO = Example([3], (Completion([20]), Completion([21])))


def shapes_of(minibatches):
    """The prompts of each minibatch, with the tokens of their completions and whether these are learned from."""
    return [
        [(e.prompt, [(list(c.ids), c.mask is None or any(c.mask)) for c in e.completions]) for e in each]
        for each in minibatches
    ]


def test_kept_completions_are_dealt_to_minibatches():
    keep = [True, False, True, True, True]
    a, c, b = ([10], True), ([13], True), [([20], True), ([21], True)]
    found = split_into_minibatches([THREE, TWO], keep, 2, None)
    assert shapes_of(found) == [[([1, 2], [a, c])], [([3], b)]]
    # Three of four: one, one and two. With 3 tokens the second completion of THREE would make 4, that of TWO makes 3.
    assert shapes_of(split_into_minibatches([THREE, TWO], keep, 3, None))[1:] == [[([1, 2], [c])], [([3], b)]]
    assert shapes_of(split_into_minibatches([THREE, TWO], keep, 1, 3)) == [[([1, 2], [a]), ([1, 2], [c]), ([3], b)]]
    few = split_into_minibatches([THREE, TWO], [False, False, False, True, False], 3, None)
    assert [[c.mask for e in each for c in e.completions] for each in few] == [[None], [[0]], [[0]]]
    whole = deal_minibatches([TWO], THREE, 2)
    assert [[c.mask for e in each for c in e.completions] for each in whole] == [[None] * 2, [[0], [0, 0], [0]]]


def test_signals_of_completions_are_as_long_as_they_are():
    signals = {"advantages": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), "kl": torch.arange(10.0).view(5, 2)}
    three, two = with_signals([THREE, TWO], signals)
    assert [dict(c.signals) for c in (*three.completions, *two.completions)] == [
        {"advantages": 1, "kl": [0]},
        {"advantages": 2, "kl": [2, 3]},
        {"advantages": 3, "kl": [4]},
        {"advantages": 4, "kl": [6]},
        {"advantages": 5, "kl": [8]},
    ]
    (less,) = without_signals([two], ["kl"])
    assert [dict(c.signals) for c in less.completions] == [{"advantages": 4}, {"advantages": 5}]


def test_numbers_of_parts_find_their_completions():
    parts = [([1], {"kl": torch.tensor([[7.0], [8.0]])}), ([0], {"kl": torch.tensor([[1.0, 0], [2, 3], [4, 0]])})]
    assert tables_of([THREE, TWO], parts)["kl"].tolist() == [[1, 0], [2, 3], [4, 0], [7, 0], [8, 0]]


def test_what_was_sampled_keeps_its_mask_and_ends_where_it_says():
    reasons = ("stop", "length", "abort", "error")
    rollouts = [Rollout([5, 6], [-1.0, -2.0], reason, mask=[1, 0]) for reason in reasons]
    (completion, *_) = example_of(TWO, rollouts).completions
    assert (completion.ids, completion.mask, completion.signals) == ([5, 6], [1, 0], {"sampler_logprobs": [-1.0, -2.0]})
    assert finished(rollouts).tolist() == [True, False, False, False]


def test_a_group_that_only_takes_part():
    group = empty_group({}, TWO, 3, functions=2)
    assert [any(c.mask) for c in group.example.completions] == [False] * 3
    assert (group.failed.all(), group.rewards.isnan().all(), tuple(group.rewards.shape)) == (True, True, (3, 2))


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
