"""What a checkpoint knows weights by, and those that it holds whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl.trainers.parts import SAMPLED, Weights, fingerprint

NUMBERS = torch.arange(6.0)


def test_fingerprints_are_of_names_shapes_and_numbers():
    alike = [("a", NUMBERS.clone().requires_grad_()), ("b", torch.ones(2))]
    expected = fingerprint([("a", NUMBERS), ("b", torch.ones(2))])
    assert fingerprint(alike) == expected
    others = [
        [("c", NUMBERS), ("b", torch.ones(2))],
        [("a", NUMBERS.view(2, 3)), ("b", torch.ones(2))],
        [("a", NUMBERS), ("b", torch.tensor([1.0, 1.001]))],
        [("b", torch.ones(2)), ("a", NUMBERS)],
        [("a", NUMBERS)],
    ]
    assert len({expected, *map(fingerprint, others)}) == 6


def test_of_a_large_tensor_numbers_in_all_its_parts_are_looked_at():
    large = torch.zeros(10, SAMPLED)
    expected = fingerprint([("a", large)])
    for place in range(0, large.numel(), 10):
        changed = large.clone()
        changed.view(-1)[place] = 1
        assert fingerprint([("a", changed)]) != expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back(dtype):
    model, other = nn.Linear(2, 3).to(dtype), nn.Linear(2, 3).to(dtype)
    state = Weights(model).state_dict()
    assert not any(tensor.requires_grad for tensor in state.values())
    Weights(other).load_state_dict(state)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)
