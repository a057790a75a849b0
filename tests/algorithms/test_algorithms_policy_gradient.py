"""Ratios, clipped surrogates and divergence estimates, by hand and as identities."""

from __future__ import annotations

import pytest
import torch

from trl.algorithms import policy_gradient as pg


def test_the_surrogate_by_hand():
    """Ratios 2, ½, 1.1 and 2, ½ again: clipped only where A pushes further out."""
    moved = torch.tensor([2.0, 0.5, 1.1, 2.0, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 3.0, -1.0, 1.0])
    found = pg.clipped_surrogate(moved, advantages, low=0.2, high=0.3)
    torch.testing.assert_close(found, torch.tensor([1.3, -0.8, 3.3, -2.0, 0.5]))
    assert pg.is_clipped(moved, advantages, low=0.2, high=0.3).tolist() == [1, 1, 0, 0, 0]


def test_at_a_bound_or_without_advantage_nothing_is_clipped():
    """Ratio 1 with bounds at 1; ratios ½ and 2 whose advantage is 0 or asks for the way back."""
    moved = torch.tensor([1.0, 1.0, 0.5, 2.0, 0.5, 2.0]).log()
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, -0.5])
    assert pg.is_clipped(moved[:2], advantages[:2], low=0.0, high=0.0).tolist() == [0, 0]
    assert pg.is_clipped(moved, advantages, low=0.2, high=0.2).tolist() == [0] * 6


def test_no_gradient_beyond_the_bound():
    moved = torch.tensor([2.0, 0.5, 2.0]).log().requires_grad_()
    pg.clipped_surrogate(moved, torch.tensor([1.0, -1.0, -1.0]), low=0.2, high=0.2).sum().backward()
    torch.testing.assert_close(moved.grad, torch.tensor([0.0, 0.0, -2.0]))


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([0.3, -1.2, 2.0])
    pg.clipped_surrogate(pg.log_ratio(logprobs, logprobs), advantages, low=0.2, high=0.2).sum().backward()
    torch.testing.assert_close(logprobs.grad, advantages)


def test_huge_ratios_stay_finite():
    moved = torch.tensor([1000.0, 1000.0, -1000.0], requires_grad=True)
    found = pg.clipped_surrogate(moved, torch.tensor([1.0, -1.0, 0.0]), low=0.2, high=0.2)
    found.sum().backward()
    assert found.isfinite().all()
    assert moved.grad.isfinite().all()


def test_estimates_by_hand():
    logprobs, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert pg.KL["k1"](logprobs, reference).item() == pytest.approx(0.693147, abs=1e-6)
    assert pg.KL["k2"](logprobs, reference).item() == pytest.approx(0.240227, abs=1e-6)
    assert pg.KL["k3"](logprobs, reference).item() == pytest.approx(0.5 - 1 + 0.693147, abs=1e-6)


def test_k1_and_k3_are_unbiased():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (policy * (policy / reference).log()).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy * pg.KL[name](policy.log(), reference.log())).sum(), exact)
