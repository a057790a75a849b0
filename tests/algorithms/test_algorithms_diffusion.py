"""Diffusion-DPO and DiffusionNFT: numbers worked by hand, and identities."""

import math

import pytest
import torch

from trl.algorithms.diffusion_dpo import diffusion_dpo, squared_error
from trl.algorithms.diffusion_nft import diffusion_nft, optimality
from trl.errors import ConfigError, ShapeError


def test_dpo_by_hand():
    # β/2 [(0.3 − 0.1) − (0.2 − 0.4)] = 2 (0.2 + 0.2)
    errors = [torch.tensor([value]) for value in (0.1, 0.4, 0.3, 0.2)]
    loss, metrics = diffusion_dpo(*errors, beta=4.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.8)), rel=1e-5)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.4, rel=1e-5)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.4, rel=1e-5)
    assert metrics["rewards/accuracies"].item() == 1


def test_dpo_at_the_reference_is_ln_2():
    chosen, rejected = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    loss, _ = diffusion_dpo(chosen, rejected, chosen, rejected, beta=5000.0)
    assert torch.allclose(loss, torch.full((5,), math.log(2)))


def test_errors_are_means_over_dimensions():
    output, target = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 0.0]]])
    assert squared_error(output, target).tolist() == [5]
    assert squared_error(output, output + 2).tolist() == [4]
    with pytest.raises(ShapeError, match="squared_error: target"):
        squared_error(output, target[0])
    with pytest.raises(ShapeError, match=r"\[P\]"):
        diffusion_dpo(*[torch.zeros(2, 1)] * 4, beta=1.0)


def nft(output, old, target, r, *, beta=1.0, level=1.0):
    rows = [torch.tensor([values]) for values in (output, old, target)]
    return diffusion_nft(*rows, torch.tensor([r]), torch.tensor([level]), beta=beta).item()


def test_nft_by_hand():
    """v = 1, 3; v_old = 0, 0; target 1, 1. v⁺ = v errs by 0, 2; v⁻ = −v by −2, −4."""
    positive, negative = (0 + 4) / 2 / 1, (4 + 16) / 2 / 3
    assert nft([1.0, 3.0], [0.0, 0.0], [1.0, 1.0], 1.0) == pytest.approx(positive)
    assert nft([1.0, 3.0], [0.0, 0.0], [1.0, 1.0], 0.0) == pytest.approx(negative)
    assert nft([1.0, 3.0], [0.0, 0.0], [1.0, 1.0], 0.25) == pytest.approx(0.25 * positive + 0.75 * negative)


def test_nft_weighs_noise_levels_by_their_error_in_the_clean_picture():
    full = nft([1.0, 3.0], [0.0, 0.0], [1.0, 1.0], 0.5)
    assert nft([1.0, 3.0], [0.0, 0.0], [1.0, 1.0], 0.5, level=0.2) == pytest.approx(0.2 * full)


def test_nft_of_a_perfect_picture_is_ordinary_training_of_the_positive_model():
    """r = 1, β = 1: the old model plays no part."""
    assert nft([1.0, 3.0], [9.0, -9.0], [0.5, 2.0], 1.0) == nft([1.0, 3.0], [0.0, 0.0], [0.5, 2.0], 1.0)


def test_nft_gradients_at_the_old_model():
    """There both models are the same: the gradient is that of r − (1 − r) times ordinary training's."""
    old, target = torch.tensor([[0.3, -0.2]]), torch.tensor([[1.0, 0.5]])
    found = []
    for r in (1.0, 0.75, 0.5, 0.0):
        output = old.clone().requires_grad_(True)
        diffusion_nft(output, old, target, torch.tensor([r]), torch.ones(1), beta=0.7).sum().backward()
        found.append(output.grad)
    assert torch.allclose(found[1], 0.5 * found[0], atol=1e-6)
    assert torch.allclose(found[2], torch.zeros(2), atol=1e-6)
    assert torch.allclose(found[3], -found[0], atol=1e-6)


def test_optimality():
    found = optimality(torch.tensor([-10.0, -5.0, 0.0, 2.5, 7.0]), bound=5.0)
    assert found.tolist() == [0, 0, 0.5, 0.75, 1]
    with pytest.raises(ConfigError, match="advantage_clip"):
        optimality(torch.zeros(1), bound=0)


def test_the_size_of_an_error_has_no_gradient():
    """v = 3 errs by 2 of 1 (r = 1): the gradient of 2² / 2 with the 2 below held is 2 · 2 / 2, of |2| alone it would be 1."""
    output = torch.tensor([[3.0]], requires_grad=True)
    diffusion_nft(output, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1), beta=1.0).sum().backward()
    assert output.grad.tolist() == [[2.0]]


def test_half_precision_is_widened_first():
    a, b, c = (torch.randn(1, 64, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(3))
    assert torch.equal(squared_error(a, b), squared_error(a.float(), b.float()))
    found, exact = (
        diffusion_nft(*x, torch.ones(1), torch.ones(1), beta=0.5)
        for x in ([a, b, c], map(torch.Tensor.float, [a, b, c]))
    )
    assert torch.equal(found, exact)


def test_nft_shapes_have_to_agree():
    with pytest.raises(ShapeError, match="diffusion_nft: target"):
        diffusion_nft(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2), torch.ones(2), beta=1.0)
