"""Losses without a reference: values by hand, and how they turn into each other."""

import math

import pytest
import torch

from trl.algorithms.reference_free import alphapo, cpo, logistic, orpo, sft, simpo


def softplus(x):
    return math.log(1 + math.exp(x))


M_W = torch.tensor([-0.5, -2.0, -0.1], dtype=torch.float64)
M_L = torch.tensor([-1.0, -0.7, -0.1], dtype=torch.float64)


def test_logistic():
    expected = [0.8 * softplus(-1.5) + 0.2 * softplus(1.5), math.log(2)]
    assert logistic(torch.tensor([1.5, 0.0]), 0.2).tolist() == pytest.approx(expected, rel=1e-6)


def test_sft_is_the_negative_log_likelihood():
    assert sft(-M_W).tolist() == [0.5, 2.0, 0.1]


def test_simpo():
    expected = [softplus(-(2.0 * d - 0.7)) for d in (0.5, -1.3, 0.0)]
    assert simpo(M_W, M_L, beta=2.0, simpo_gamma=0.7).tolist() == pytest.approx(expected)


def test_simpo_without_margin_is_sigmoid_of_mean_log_probabilities():
    torch.testing.assert_close(simpo(M_W, M_L, beta=2.0, simpo_gamma=0.0), logistic(2.0 * (M_W - M_L)))


def test_cpo_without_imitation_is_simpo_of_unnormalised_log_probabilities():
    nll = torch.full_like(M_W, 3.0)
    preference = cpo(M_W, M_L, nll, beta=2.0, cpo_alpha=0.0)
    torch.testing.assert_close(preference, simpo(M_W, M_L, beta=2.0, simpo_gamma=0.0))
    torch.testing.assert_close(cpo(M_W, M_L, nll, beta=2.0, cpo_alpha=0.5), preference + 1.5)


def test_alphapo():
    # rewards (1 − p^−α) / α with p = e^m, α = 0.25
    reward_w, reward_l = (1 - math.exp(0.125)) / 0.25, (1 - math.exp(0.25)) / 0.25
    expected = softplus(-(2.0 * (reward_w - reward_l) - 0.7))
    loss = alphapo(M_W[:1], M_L[:1], beta=2.0, simpo_gamma=0.7, alphapo_alpha=0.25)
    assert loss.tolist() == pytest.approx([expected])


def test_alphapo_tends_to_simpo():
    target = simpo(M_W, M_L, beta=2.0, simpo_gamma=0.7)
    for alpha, tolerance in ((0.0, 0.0), (1e-6, 1e-5), (-1e-6, 1e-5)):
        loss = alphapo(M_W, M_L, beta=2.0, simpo_gamma=0.7, alphapo_alpha=alpha)
        torch.testing.assert_close(loss, target, rtol=0, atol=tolerance)


def test_orpo():
    # odds: p/(1−p) with p = ¾ and ¼ are 3 and ⅓, so their log-ratio is log 9, and −log σ(log 9) = log(10/9)
    chosen, rejected = torch.tensor([0.75]).log(), torch.tensor([0.25]).log()
    loss = orpo(chosen, rejected, -chosen, beta=0.1)
    assert loss.tolist() == pytest.approx([-math.log(0.75) + 0.1 * math.log(10 / 9)], rel=1e-5)


def test_orpo_of_equal_completions_is_imitation_and_log_two():
    torch.testing.assert_close(orpo(M_W, M_W, -M_W, beta=0.1), -M_W + 0.1 * math.log(2))


def test_orpo_without_weight_is_sft():
    torch.testing.assert_close(orpo(M_W, M_L, -M_W, beta=0.0), sft(-M_W))


def test_orpo_tends_to_simpo_for_improbable_completions():
    # 1 − p → 1, so the log odds become log-probabilities
    chosen, rejected = M_W - 40, M_L - 40
    torch.testing.assert_close(
        orpo(chosen, rejected, torch.zeros(3), beta=1.0), simpo(chosen, rejected, beta=1.0, simpo_gamma=0.0)
    )


def test_orpo_is_finite_where_the_policy_is_certain():
    certain = torch.zeros(1, requires_grad=True)
    loss = orpo(certain, torch.tensor([-1.0]), -certain, beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert certain.grad.isfinite().all()
