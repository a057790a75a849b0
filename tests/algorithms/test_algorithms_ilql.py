"""ILQL's losses by hand, and what they are in special cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.algorithms.support import make_batch
from trl.algorithms import sft
from trl.algorithms.ilql import (
    ILQL,
    awac_weights,
    expectile_loss,
    next_values,
    place_rewards,
    polyak_update,
    q_loss,
)
from trl.errors import ConfigError, DataError
from trl.types import Scores

MASK = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
"""The first completion has an action, another one, a token of somebody else's, and a last action."""

VALUES = torch.tensor([[0.5, -0.2, 0.0, 0.8], [0.0, 0.3, 0.0, 0.0]])
TARGET_Q = torch.tensor([[0.4, 0.1, 0.0, 1.0], [0.0, -0.5, 0.0, 0.0]])
Q = (
    torch.tensor([[0.0, 0.5, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0]]),
    torch.tensor([[1.0, -0.5, 0.0, 1.5], [0.0, 0.0, 0.0, 0.0]]),
)
Q_LOGPROBS = (
    torch.tensor([[-1.0, -2.0, 0.0, -0.5], [0.0, -3.0, 0.0, 0.0]]),
    torch.tensor([[-0.5, -1.0, 0.0, -0.2], [0.0, -2.0, 0.0, 0.0]]),
)
LOGPROBS = torch.tensor([[-0.1, -0.7, 0.0, -1.2], [0.0, -0.4, 0.0, 0.0]])


def scored(**changes) -> Scores:
    extras = {"q_0": Q[0], "q_1": Q[1], "q_logprobs_0": Q_LOGPROBS[0], "q_logprobs_1": Q_LOGPROBS[1]}
    extras |= {"target_q": TARGET_Q, **changes}
    return Scores(LOGPROBS, value=VALUES, extras=extras)


BATCH = make_batch(MASK, reward=torch.tensor([2.0, -1.0]))


def test_the_reward_lies_on_the_last_action():
    found = place_rewards(torch.tensor([2.0, -1.0]), MASK)
    assert found.tolist() == [[0.0, 0.0, 0.0, 2.0], [0.0, -1.0, 0.0, 0.0]]


def test_rewards_of_tokens_stay_where_they_are_and_count_for_actions_alone():
    given = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    assert torch.equal(place_rewards(given, MASK), given * MASK)


def test_a_completion_without_an_action_has_no_reward():
    assert place_rewards(torch.tensor([5.0]), torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


def test_rewards_of_another_shape_are_refused():
    with pytest.raises(DataError, match=r"shape \(2, 1\) for a mask of shape \(2, 4\)"):
        place_rewards(torch.zeros(2, 1), MASK)


def test_the_next_state_is_that_of_the_next_action():
    """After action 1 comes action 3; what lies between is not the policy's. After the last one nothing comes."""
    found = next_values(VALUES, MASK)
    torch.testing.assert_close(found, torch.tensor([[-0.2, 0.8, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_terms_by_hand():
    """γ = 0.5: y is 0.5 · −0.2, 0.5 · 0.8, 2 in the first completion, and −1 in the second."""
    loss, metrics = ILQL(gamma=0.5, tau=0.7, beta=2.0, cql_scale=0.1, awac_scale=0.5).loss(scored(), BATCH)
    y = [-0.1, 0.4, 2.0, -1.0]
    flat = BATCH.scored
    q = [
        (0.0 - y[0]) ** 2 + (1.0 - y[0]) ** 2,
        (0.5 - y[1]) ** 2 + (-0.5 - y[1]) ** 2,
        (2.0 - y[2]) ** 2 + (1.5 - y[2]) ** 2,
        (1.0 - y[3]) ** 2 + (0.0 - y[3]) ** 2,
    ]
    v = [0.3 * 0.1**2, 0.7 * 0.3**2, 0.7 * 0.2**2, 0.3 * 0.8**2]
    cql = [1.5, 3.0, 0.7, 5.0]
    awac = [0.1 * math.exp(-0.2), 0.7 * math.exp(0.6), 1.2 * math.exp(0.4), 0.4 * math.exp(-1.6)]
    assert metrics["loss/q"].flatten()[flat].tolist() == pytest.approx(q, rel=1e-5)
    assert metrics["loss/v"].flatten()[flat].tolist() == pytest.approx(v, rel=1e-5)
    assert metrics["loss/cql"].flatten()[flat].tolist() == pytest.approx(cql, rel=1e-5)
    assert metrics["loss/awac"].flatten()[flat].tolist() == pytest.approx(awac, rel=1e-5)
    expected = [a + b + 0.1 * c + 0.5 * d for a, b, c, d in zip(q, v, cql, awac, strict=True)]
    assert loss.flatten()[flat].tolist() == pytest.approx(expected, rel=1e-5)
    assert not (loss * (1 - MASK)).any()


def test_without_awac_weights_the_policy_is_fine_tuned():
    """β = 0: L_AWAC is cross-entropy."""
    _, metrics = ILQL(beta=0.0).loss(scored(), BATCH)
    torch.testing.assert_close(metrics["loss/awac"], sft.nll(scored()))


def test_the_expectile_of_one_half_is_the_mean():
    """τ = ½: L_V is half the squared error, and least at the mean of Q."""
    q = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    value = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    loss = expectile_loss(value.expand(3), q, tau=0.5)
    torch.testing.assert_close(loss, (q - 1.0).square() / 2)
    loss.sum().backward()
    assert value.grad.item() == pytest.approx(0.0)


def test_a_high_expectile_lies_near_the_best_action():
    """Two actions 0 and 1: the minimum of (1 − τ) V² + τ (1 − V)² is V = τ."""
    value = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    expectile_loss(value.expand(2), torch.tensor([0.0, 1.0], dtype=torch.float64), tau=0.9).sum().backward()
    assert value.grad.item() == pytest.approx(0.0)


def test_two_equal_qs_are_one_twice():
    """L_Q and L_CQL double, L_V and L_AWAC are those of one Q."""
    equal = scored(q_1=Q[0], q_logprobs_1=Q_LOGPROBS[0])
    two, one = ILQL().loss(equal, BATCH)[1], ILQL(two_qs=False).loss(equal, BATCH)[1]
    for name, factor in {"loss/q": 2, "loss/cql": 2, "loss/v": 1, "loss/awac": 1}.items():
        torch.testing.assert_close(two[name], factor * one[name])


def test_a_reward_per_completion_is_one_per_token_on_the_last_action():
    per_token = place_rewards(BATCH.signals["reward"], MASK)
    torch.testing.assert_close(
        ILQL().loss(scored(), BATCH)[0], ILQL().loss(scored(), make_batch(MASK, reward=per_token))[0]
    )


def test_without_discount_and_later_values_q_is_the_reward():
    """γ = 0: L_Q is regression on the rewards."""
    _, metrics = ILQL(gamma=0.0, two_qs=False).loss(scored(), BATCH)
    torch.testing.assert_close(
        metrics["loss/q"] * MASK, q_loss(Q[0], place_rewards(BATCH.signals["reward"], MASK)) * MASK
    )


def test_what_flows_where():
    """L_Q trains Q alone, L_V trains V alone, L_AWAC the policy alone; targets train nothing."""
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in (("value", VALUES), ("logprobs", LOGPROBS), ("q_0", Q[0]), ("target_q", TARGET_Q))
    }
    extras = {**scored().extras, "q_0": leaves["q_0"], "target_q": leaves["target_q"]}
    scores = replace(scored(), logprobs=leaves["logprobs"], value=leaves["value"], extras=extras)
    ILQL(beta=1.0, cql_scale=0.0).loss(scores, BATCH)[0].sum().backward()
    assert leaves["target_q"].grad is None
    y = torch.tensor([[0.99 * -0.2, 0.99 * 0.8, 0.0, 2.0], [0.0, -1.0, 0.0, 0.0]])
    torch.testing.assert_close(leaves["q_0"].grad, 2 * (Q[0] - y) * MASK)
    torch.testing.assert_close(leaves["logprobs"].grad, -awac_weights(TARGET_Q, VALUES, beta=1.0) * MASK)
    slope = torch.where(TARGET_Q < VALUES, 0.3, 0.7) * 2 * (VALUES - TARGET_Q)
    torch.testing.assert_close(leaves["value"].grad, slope * MASK)


def test_a_target_moves_towards_its_source():
    target, source = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0], requires_grad=True)]
    polyak_update(target, source, alpha=0.25)
    assert target[0].tolist() == [1.5, 1.0]
    polyak_update(target, source, alpha=1.0)
    assert torch.equal(target[0], source[0])
    assert not target[0].requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 1.5}, "tau=1.5: give 0 to 1"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"cql_scale": -1.0}, "cql_scale=-1.0"),
        ({"steps_for_target_q_sync": 0}, "steps_for_target_q_sync=0"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        ILQL(**options)


def test_a_batch_without_rewards_is_refused():
    with pytest.raises(DataError, match="needs the signal 'reward'"):
        ILQL().loss(scored(), replace(BATCH, signals={}))
