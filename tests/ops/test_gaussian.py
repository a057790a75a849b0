"""Gaussian densities of latents: numbers worked by hand, and torch's own distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from trl.errors import ShapeError
from trl.ops.gaussian import gaussian_entropy, gaussian_kl, gaussian_logprob


def test_logprob_by_hand():
    # z = 1 and −2: −(1 + 4)/4 − log 2 − ½ log 2π
    found = gaussian_logprob(torch.tensor([[3.0, -3.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
    assert found.item() == pytest.approx(-1.25 - math.log(2) - 0.5 * math.log(2 * math.pi), abs=1e-6)


def test_kl_by_hand():
    # (2² + 0²)/2 over 2 · 2²
    found = gaussian_kl(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
    assert found.item() == pytest.approx(0.25)


def test_all_are_means_over_dimensions():
    torch.manual_seed(0)
    x, mean, other = torch.randn(3, 5, 2, 4, 4)[:, :, 0, :2].unbind(0)
    sd = torch.rand(5) + 0.1
    wide = sd[:, None, None]
    assert torch.allclose(gaussian_logprob(x, mean, sd), Normal(mean, wide).log_prob(x).flatten(1).mean(1), atol=1e-5)
    exact = kl_divergence(Normal(mean, wide), Normal(other, wide)).flatten(1).mean(1)
    assert torch.allclose(gaussian_kl(mean, other, sd), exact, rtol=1e-5)
    assert torch.allclose(gaussian_entropy(sd), Normal(0, sd).entropy(), atol=1e-6)


def test_kl_is_what_samples_say():
    """E[log p − log q] over many samples of p."""
    generator = torch.Generator().manual_seed(1)
    mean, other, sd = torch.zeros(1, 200_000), torch.full((1, 200_000), 0.3), torch.tensor([0.6])
    x = mean + sd * torch.randn(mean.shape, generator=generator)
    estimate = gaussian_logprob(x, mean, sd) - gaussian_logprob(x, other, sd)
    assert estimate.item() == pytest.approx(gaussian_kl(mean, other, sd).item(), rel=0.05)


def test_one_deviation_per_latent():
    with pytest.raises(ShapeError, match=r"gaussian_kl: sd has shape \(2, 1\), but \[M\] is expected"):
        gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(ShapeError, match="gaussian_logprob: mean has shape"):
        gaussian_logprob(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2))


def test_half_precision_is_widened_first():
    x, mean, other = (torch.randn(1, 64, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(3))
    sd = torch.tensor([0.7]).bfloat16()
    wide = sd.float()
    assert torch.equal(gaussian_logprob(x, mean, sd), gaussian_logprob(x.float(), mean.float(), wide))
    assert torch.equal(gaussian_kl(mean, other, sd), gaussian_kl(mean.float(), other.float(), wide))
    assert torch.equal(gaussian_entropy(sd), gaussian_entropy(wide))
