"""What a checkpoint knows weights by, and those that it holds whole."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl.models.reference import AdapterOff, FrozenModel, SnapshotReference
from trl.training.state import Unchanged, Weights, fingerprint, reference_part

NUMBERS = torch.arange(6.0)


def test_fingerprints_are_of_names_shapes_and_numbers():
    part_of_another = torch.arange(-1.0, 6.0)[1:]
    alike = [("a", part_of_another.requires_grad_()), ("b", torch.ones(2))]
    expected = fingerprint([("a", NUMBERS), ("b", torch.ones(2))])
    assert fingerprint(alike) == expected
    others = [
        [("c", NUMBERS), ("b", torch.ones(2))],
        [("a", NUMBERS.view(2, 3)), ("b", torch.ones(2))],
        [("a", NUMBERS.flip(0)), ("b", torch.ones(2))],
        [("a", NUMBERS.half()), ("b", torch.ones(2))],
        [("a", NUMBERS), ("b", torch.tensor([1.0, 1.001]))],
        [("b", torch.ones(2)), ("a", NUMBERS)],
        [("a", NUMBERS)],
    ]
    assert len({expected, *map(fingerprint, others)}) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back(dtype):
    model, other = nn.Linear(2, 3).to(dtype), nn.Linear(2, 3).to(dtype)
    state = Weights(model).state_dict()
    assert not any(tensor.requires_grad for tensor in state.values())
    Weights(other).load_state_dict(state)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


def adapted(make_model, seed):
    base = make_model("llama")
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"))


def test_of_an_adapter_that_is_switched_off_only_the_model_below_counts(make_model):
    one, other = (adapted(make_model, seed) for seed in (1, 2))
    state = reference_part(AdapterOff(), one, moves=False).state_dict()
    assert reference_part(AdapterOff(), other, moves=False).state_dict() == state
    with torch.no_grad():
        other.get_base_model().lm_head.weight[0, 0] += 1
    assert reference_part(AdapterOff(), other, moves=False).state_dict() != state


def test_an_adapter_as_it_was_comes_back(make_model):
    reference = SnapshotReference.of(adapted(make_model, 1))
    part = reference_part(reference, nn.Identity(), moves=False)
    state = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    for tensor in reference.weights.values():
        tensor.zero_()
    part.load_state_dict(state)
    assert all(torch.equal(reference.weights[name], tensor) for name, tensor in state.items())
    assert any(tensor.any() for tensor in state.values())


def test_a_copy_is_held_whole_where_it_moves(make_model):
    reference = FrozenModel(make_model("llama"))
    assert isinstance(reference_part(reference, nn.Identity(), moves=True), Weights)
    assert isinstance(reference_part(reference, nn.Identity(), moves=False), Unchanged)
    assert reference_part(None, nn.Identity(), moves=False) is None
