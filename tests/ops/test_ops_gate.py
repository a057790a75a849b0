"""Kernels of gated networks: the numbers of PyTorch's operations, rounded where these round."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trl.ops.triton_gate import ACTIVATIONS, gated, gated_backward, name_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def factors(dtype):
    """g, u and a gradient of their product: more than one block of numbers, and no whole number of blocks."""
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(3, 2, 700, generator=generator)).to(DEVICE, dtype).unbind()


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_and_gradients(activation, dtype):
    gate, up, grad = factors(dtype)
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    product = ACTIVATIONS[activation](leaves[0]) * leaves[1]
    expected = torch.autograd.grad(product, leaves, grad)
    *found, again = gated_backward(gate, up, grad, activation, product=True)
    half = 1.6e-2 if DEVICE.type == "cpu" else 4e-3  # the interpreter cuts bits off, twice, where a device rounds
    close = {"rtol": 1e-5, "atol": 5e-6} if dtype == torch.float32 else {"rtol": half, "atol": 1e-4}
    for a, b in zip([gated(gate, up, activation), again, *found], [product, product, *expected], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.detach(), **close)
    assert torch.equal(gated(gate, up, activation), again)
    assert gated_backward(gate, up, grad, activation, product=False)[2] is None


def test_activations_are_known_by_what_they_compute():
    assert name_of(torch.nn.SiLU()) == "silu"
    assert name_of(torch.nn.GELU(approximate="tanh")) == "tanh"
    assert name_of(torch.nn.GELU()) is None
    assert name_of("silu") is None
