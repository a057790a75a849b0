"""Credit where rewards hardly differ, or do not; what each formula gives is in test_algorithms_grpo.py."""

from __future__ import annotations

import math

import pytest
import torch

from trl.algorithms.advantages import advantages, combine_rewards, has_no_variance


@pytest.mark.parametrize("size", [2, 3, 7, 12])
@pytest.mark.parametrize("reward", [0.1, 0.44593316, 100.1, -7e-5])
def test_equal_rewards_teach_nothing_whatever_they_are(reward, size):
    """Their mean is rounded in float32, and would leave a difference."""
    rewards, group = torch.full((size,), reward), torch.zeros(size)
    assert has_no_variance(rewards, group).all()
    for baseline, scale in (("group", "group"), ("leave_one_out", "none")):
        assert not advantages(rewards, group, baseline=baseline, scale=scale).any()
    both = torch.stack([rewards, rewards], 1)
    assert not combine_rewards(both, torch.ones(2), group, aggregation="normalize_then_sum").any()


def test_a_group_of_one_teaches_nothing():
    rewards, group = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4, 2, 2])
    assert has_no_variance(rewards, group).tolist() == [True, False, False]
    for baseline in ("group", "leave_one_out"):
        assert advantages(rewards, group, baseline=baseline, scale="none")[0] == 0


def test_without_a_baseline_a_reward_is_the_advantage():
    rewards, group = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0, 0, 7])
    assert torch.equal(advantages(rewards, group, baseline="none", scale="none"), rewards)


def test_small_differences_stay_small():
    """Rewards 0 and √2 · 10⁻⁴ have standard deviation 10⁻⁴, to which ε adds as much."""
    rewards, group = torch.tensor([0.0, math.sqrt(2) * 1e-4]), torch.zeros(2)
    expected = torch.tensor([-1.0, 1.0]) * math.sqrt(2) / 4
    torch.testing.assert_close(advantages(rewards, group, baseline="group", scale="group"), expected)
    torch.testing.assert_close(advantages(rewards, group, baseline="batch", scale="batch"), expected)
    found = combine_rewards(rewards[:, None], torch.ones(1), group, aggregation="normalize_then_sum")
    torch.testing.assert_close(found, expected)
