"""Reward models: comparisons, scores, steps; values by hand and identities."""

import math

import pytest
import torch

from tests.algorithms.support import make_batch
from trl.algorithms.reward import (
    PairwiseReward,
    ScoreRegression,
    StepReward,
    bradley_terry,
)
from trl.errors import ConfigError, DataError


def softplus(x):
    return math.log(1 + math.exp(x))


def make(count, *, mask=None, **signals):
    return make_batch(torch.ones(count, 1) if mask is None else mask, **signals)


REWARDS = torch.tensor([1.5, -0.5, 0.2, 0.7])


def test_bradley_terry():
    loss, metrics = PairwiseReward().loss(REWARDS, make(4))
    assert loss.tolist() == pytest.approx([softplus(-2.0), softplus(0.5)], rel=1e-6)
    assert metrics["accuracy"].tolist() == [1.0, 0.0]
    assert metrics["margin"].tolist() == pytest.approx([2.0, -0.5])


def test_equal_rewards_cost_log_two_and_are_no_success():
    loss, metrics = PairwiseReward().loss(torch.zeros(2), make(2))
    assert loss.tolist() == pytest.approx([math.log(2)])
    assert metrics["accuracy"].tolist() == [0.0]


def test_any_lead_is_a_success_and_an_offset_may_be_left_free():
    _, metrics = PairwiseReward(center_rewards_coefficient=0.0).loss(torch.tensor([0.5, 0.25]), make(2))
    assert metrics["accuracy"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("algorithm", "signals"),
    [(PairwiseReward(), {}), (ScoreRegression(), {"score": REWARDS}), (StepReward(), {"step_label": REWARDS[:, None]})],
)
def test_metrics_keep_no_graph(algorithm, signals):
    rewards = REWARDS.clone().requires_grad_()
    given = rewards[:, None] if "step_label" in signals else rewards
    loss, metrics = algorithm.loss(given, make(4, **signals))
    assert loss.requires_grad
    assert not [name for name, value in metrics.items() if value.requires_grad]


def test_only_the_difference_matters():
    loss, _ = PairwiseReward().loss(REWARDS, make(4))
    torch.testing.assert_close(PairwiseReward().loss(REWARDS + 7, make(4))[0], loss)


def test_the_margin_is_the_chosen_completions():
    margin = torch.tensor([1.0, 99.0, 0.5, 99.0])
    loss, metrics = PairwiseReward().loss(REWARDS, make(4, margin=margin))
    assert loss.tolist() == pytest.approx([softplus(-1.0), softplus(1.0)], rel=1e-6)
    assert metrics["margin"].tolist() == pytest.approx([2.0, -0.5])


def test_a_margin_is_an_offset_of_the_chosen_reward():
    chosen, rejected = REWARDS[0::2], REWARDS[1::2]
    torch.testing.assert_close(bradley_terry(chosen, rejected, 0.3), bradley_terry(chosen - 0.3, rejected))


def test_centring_adds_the_squared_sum():
    loss, _ = PairwiseReward(center_rewards_coefficient=0.1).loss(REWARDS, make(4))
    assert loss.tolist() == pytest.approx([softplus(-2.0) + 0.1, softplus(0.5) + 0.081], rel=1e-6)


def test_centring_pulls_the_offset_to_zero():
    offset = torch.tensor(3.0, requires_grad=True)
    loss, _ = PairwiseReward(center_rewards_coefficient=0.1).loss(torch.tensor([0.5, -0.5]) + offset, make(2))
    loss.sum().backward()
    # d/do 0.1 (2 o)² = 0.8 o
    assert offset.grad.item() == pytest.approx(2.4)


def test_reward_gradient_is_the_probability_of_the_wrong_order():
    rewards = torch.tensor([1.5, -0.5], requires_grad=True)
    PairwiseReward().loss(rewards, make(2))[0].sum().backward()
    wrong = 1 / (1 + math.exp(2.0))
    assert rewards.grad.tolist() == pytest.approx([-wrong, wrong], rel=1e-5)


def test_mean_smallest_and_largest_reward():
    _, metrics = PairwiseReward().loss(REWARDS, make(4))
    assert metrics["mean_reward"].mean().item() == pytest.approx(0.475)
    assert metrics["min_reward"].amin().item() == pytest.approx(-0.5)
    assert metrics["max_reward"].amax().item() == pytest.approx(1.5)


def test_scores_are_met_by_least_squares():
    loss, metrics = ScoreRegression().loss(REWARDS, make(4, score=torch.tensor([1.0, -0.5, 1.2, 0.0])))
    assert loss.tolist() == pytest.approx([0.25, 0.0, 1.0, 0.49])
    assert metrics["absolute_error"].tolist() == pytest.approx([0.5, 0.0, 1.0, 0.7])


def test_steps():
    logits = torch.tensor([[0.3, 2.0, 9.0], [0.3, -1.0, 0.5]])
    mask = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    label = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.25]])
    loss, metrics = StepReward().loss(logits, make(2, mask=mask, step_label=label))
    expected = [[0.0, softplus(-2.0), 0.0], [0.0, softplus(1.0), 0.25 * softplus(-0.5) + 0.75 * softplus(0.5)]]
    for row, numbers in zip(loss.tolist(), expected, strict=True):
        assert row == pytest.approx(numbers, rel=1e-6)
    assert (metrics["accuracy"] * mask).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_step_is_right_above_one_half():
    """Logits of −1, 0 and 1 for labels of ½ and 0.6."""
    logits = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]])
    label = torch.tensor([[0.5, 0.5, 0.5], [0.6, 0.6, 0.6]])
    _, metrics = StepReward().loss(logits, make(2, mask=torch.ones(2, 3), step_label=label))
    assert metrics["accuracy"].tolist() == [[1, 1, 0], [0, 0, 1]]


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ConfigError, match=r"center_rewards_coefficient=-0\.1"):
        PairwiseReward(center_rewards_coefficient=-0.1)


@pytest.mark.parametrize(("algorithm", "signal"), [(ScoreRegression(), "score"), (StepReward(), "step_label")])
def test_a_missing_label_is_named(algorithm, signal):
    with pytest.raises(DataError, match=f"needs the signal '{signal}'"):
        algorithm.loss(REWARDS, make(4))


def test_an_odd_number_of_rewards_is_refused():
    with pytest.raises(DataError, match="even number of completions, got 3"):
        PairwiseReward().loss(REWARDS[:3], make(3))
