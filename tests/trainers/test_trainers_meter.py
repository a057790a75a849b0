import pytest
import torch

from trl.data.layout import lay_out
from trl.training.metrics import Meter
from trl.training.window import dummy_batch, normalize_weights, plan_micro_batches, split_into_slots, with_statistics
from trl.types import Completion, Example

BATCH = lay_out([Example([1], (Completion([2, 3]),)), Example([1], (Completion([4]),))])
CPU = torch.device("cpu")


def test_means_and_extremes_by_hand():
    meter = Meter()
    nan = float("nan")
    meter.add({"logits/chosen": torch.tensor([[1.0, 2.0], [nan, nan]])}, BATCH)
    meter.add({"entropy": torch.tensor([[1.0, 2.0], [6.0, 99.0]]), "reward": torch.tensor([3.0, nan])}, BATCH)
    meter.add({"reward": torch.tensor([5.0]), "min_reward": torch.tensor([4.0, -1.0])}, BATCH)
    meter.add({"min_reward": torch.tensor([2.0])}, BATCH)
    meter.count("padding_share", 1, per=4)
    meter.count("padding_share", 2, per=4)
    found = meter.read(lambda row: row, CPU)
    expected = {"logits/chosen": 1.5, "entropy": 3.0, "reward": 4.0, "padding_share": 3 / 8, "min_reward": -1.0}
    assert found == expected
    assert meter.read(lambda row: row, CPU) == {}


def test_means_over_processes():
    meter = Meter()
    meter.add({"reward": torch.tensor([1.0]), "max_reward": torch.tensor([1.0])}, BATCH)
    found = meter.read(lambda row: torch.cat([row, torch.tensor([[6.0, 2.0, 9.0]], dtype=torch.float64)]), CPU)
    assert found == {"reward": pytest.approx(7 / 3), "max_reward": 9.0}


def test_a_metric_without_entries_is_left_out():
    meter = Meter()
    meter.add({"reward": torch.tensor([float("nan")])}, BATCH)
    assert meter.read(lambda row: row, CPU) == {}


def test_extremes_leave_out_what_does_not_apply():
    meter, nan = Meter(), float("nan")
    meter.add({"min_reward": torch.tensor([nan, 3.0]), "max_reward": torch.tensor([[nan, -3.0], [-5.0, nan]])})
    assert meter.read(lambda row: row, CPU) == {"min_reward": 3.0, "max_reward": -3.0}
    meter.add({"min_reward": torch.tensor([nan]), "max_reward": torch.tensor([nan])})
    assert meter.read(lambda row: row, CPU) == {}


def test_counts_are_means_unless_told_otherwise():
    meter = Meter()
    meter.count("tried", 1)
    meter.count("tried", 4)
    assert meter.read(lambda row: row, CPU) == {"tried": 2.5}


def test_what_is_held_keeps_no_graph():
    meter, x = Meter(), torch.ones(1, requires_grad=True)
    meter.add({"reward": 2 * x, "entropy": x.expand(2, 2), "max_reward": 3 * x}, BATCH)
    state = meter.state_dict()
    assert not any(held.requires_grad for part in state.values() for held in part.values())
    again = Meter()
    again.load_state_dict(state)
    found = again.read(lambda row: row, CPU)
    assert found == {"reward": 2.0, "entropy": 1.0, "max_reward": 3.0}
    assert {type(value) for value in found.values()} == {float}


def test_micro_batches_hold_sequences_of_like_length():
    assert plan_micro_batches([3, 9, 1, 8, 2, 7], count=3) == [[1, 3], [5, 0], [4, 2]]
    assert plan_micro_batches([5, 4], count=8) == [[0], [1]]
    assert plan_micro_batches([3, 9, 1], count=1) == [[1, 0, 2]]
    assert plan_micro_batches([], count=2) == []


def test_a_token_budget_opens_micro_batches_as_needed():
    # Padded to their longest: 9 | 8 8 would be 16 > 15 | 4 4 4 is 12 | 2 would make 4·4 = 16.
    assert plan_micro_batches([4, 9, 8, 4, 2, 4], count=1, token_budget=15) == [[1], [2], [0, 3, 5], [4]]
    assert plan_micro_batches([20], count=1, token_budget=15) == [[0]]
    assert plan_micro_batches([1, 1, 1, 1], count=2, token_budget=100) == [[0, 1], [2, 3]]
    assert plan_micro_batches([5, 5, 5], count=1, token_budget=15) == [[0, 1, 2]]
    assert plan_micro_batches([9, 1, 1, 1], count=2, token_budget=9) == [[0], [1, 2, 3]]


def test_micro_batches_are_dealt_to_counted_steps():
    assert split_into_slots("abcde", 2) == [["a", "b"], ["c", "d", "e"]]


def test_weights_of_a_window_sum_to_one_over_processes():
    # 3 scored tokens here, 5 more elsewhere, where there are so many tokens that float32 would lose some.
    elsewhere = torch.tensor([5.0, 2.0**24])
    batches, tokens = normalize_weights([BATCH], lambda b: b.mask, lambda local: local + elsewhere)
    assert batches[0].weight.tolist() == [pytest.approx([1 / 8, 1 / 8]), pytest.approx([1 / 8, 0])]
    assert tokens == 2**24 + 5


def test_weights_below_one_are_normalised_as_well():
    (found,), _ = normalize_weights([BATCH], lambda b: b.mask / 8, lambda local: local)
    assert found.weight.tolist() == [pytest.approx([1 / 3, 1 / 3]), pytest.approx([1 / 3, 0])]


def test_a_filler_takes_part_and_counts_nothing():
    (batch,), _ = normalize_weights([BATCH], lambda b: b.mask, lambda local: local)
    idle = dummy_batch(batch)
    assert (idle.mask.shape, idle.mask.any(), idle.weight.any()) == (batch.mask.shape, False, False)
    assert (len(idle.scored), idle.tokens) == (0, 0)
    assert idle.inputs is batch.inputs


def test_numbers_of_a_window_are_signals_of_each_of_its_completions():
    (found,) = with_statistics([BATCH], {"shift": torch.tensor(3.0)})
    assert found.signals["shift"].tolist() == [3.0, 3.0]
    assert with_statistics([BATCH], {}) == [BATCH]
