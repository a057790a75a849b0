"""f-divergences: values, limits, and how each relates to the reverse KL."""

import math

import pytest
import torch

from trl.algorithms.f_dpo import F_DIVERGENCES, alpha_divergence, forward_kl, js_divergence, power, reverse_kl

H = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64)
U = [math.exp(h) for h in H.tolist()]


def test_reverse_kl_is_the_log_ratio():
    assert reverse_kl(H) is H


def test_forward_kl():
    assert forward_kl(H).tolist() == pytest.approx([1 - 1 / u for u in U])


def test_js_divergence():
    assert js_divergence(H).tolist() == pytest.approx([math.log(2 * u / (1 + u)) for u in U])
    assert js_divergence(torch.tensor([60.0])).item() == pytest.approx(math.log(2))


def test_alpha_divergence():
    # c = 0.3, that is α = 0.7: (1 − u^−0.7) / 0.7
    score = alpha_divergence(H, f_alpha_divergence_coef=0.3)
    assert score.tolist() == pytest.approx([(1 - u**-0.7) / 0.7 for u in U])


def test_alpha_divergence_lies_between_the_two_kl_divergences():
    torch.testing.assert_close(alpha_divergence(H, f_alpha_divergence_coef=1.0), reverse_kl(H), rtol=0, atol=0)
    torch.testing.assert_close(alpha_divergence(H, f_alpha_divergence_coef=0.0), forward_kl(H), rtol=0, atol=0)
    torch.testing.assert_close(alpha_divergence(H, f_alpha_divergence_coef=1 + 1e-7), reverse_kl(H))


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_every_score_is_zero_with_slope_one_or_less_at_the_reference_and_increases(name):
    keywords = {"f_alpha_divergence_coef": 0.5} if name == "alpha_divergence" else {}
    h = H.clone().requires_grad_()
    score = F_DIVERGENCES[name](h, **keywords)
    score.sum().backward()
    assert score[2].item() == pytest.approx(0.0, abs=1e-15)
    assert (h.grad > 0).all()
    # slope u f''(u): 1 at the reference, and ½ for Jensen–Shannon
    assert h.grad[2].item() == pytest.approx(0.5 if name == "js_divergence" else 1.0)


def test_powers_stay_finite_in_single_precision():
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    score = power(far, -1.0) - power(far.flip(0), -1.0)
    score.sum().backward()
    assert score.isfinite().all()
    assert far.grad.isfinite().all()
