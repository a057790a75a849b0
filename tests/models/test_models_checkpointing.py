"""Which layers are checkpointed, and what the others keep."""

import pytest
import torch
from torch import nn

from trl.models.checkpointing import (
    checkpoint_activations,
    checkpointable_layers,
    kept_for_backward,
    layers_to_recompute,
)
from trl.trainers.activation_plan import CheckpointFirstLayers


@pytest.mark.parametrize(
    ("free", "count"),
    # A layer saves 30 of 130 bytes.
    [(200, 0), (130, 0), (129, 1), (100, 1), (99, 2), (40, 3), (39, 4), (10, 4), (0, 4)],
)
def test_as_few_layers_as_memory_asks_for(free, count):
    assert layers_to_recompute(kept=130, saved=[30] * 4, free=free) == count


def test_what_is_kept_for_backward_by_hand():
    """Of rows of 3 through 3 → 5, tanh and 5 → 2, in float32: the input, and the tanh's output once, which two
    operations read."""
    net, x = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)), torch.ones(7, 3)
    with torch.no_grad():
        assert kept_for_backward(lambda: net(x), net.parameters()) == [4 * (7 * 3 + 7 * 5)]
    assert kept_for_backward(lambda: net(x), [*net.parameters(), x]) == [4 * 7 * 5]
    assert kept_for_backward(lambda: net(x), []) == [4 * (7 * 3 + 7 * 5 + 5 * 2)]  # the first weight is not needed
    assert kept_for_backward(lambda: net.requires_grad_(False)(x), []) == [0]


def test_what_layers_keep_alone_and_what_several_do():
    net, x = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)), torch.ones(7, 3)
    first, tanh, _ = net
    assert kept_for_backward(lambda: net(x), net.parameters(), [first]) == [4 * 7 * 3, 4 * 7 * 5]
    assert kept_for_backward(lambda: net(x), net.parameters(), [first, tanh]) == [4 * 7 * 3, 0, 4 * 7 * 5]
    assert kept_for_backward(lambda: net(x), net.parameters(), [net]) == [4 * (7 * 3 + 7 * 5), 0]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.modules())


def test_layers_that_save_nothing_come_before_some_that_do():
    assert layers_to_recompute(kept=100, saved=[-5, -5, 60, 60], free=60) == 3
    assert layers_to_recompute(kept=100, saved=[-5, -5, 60, 60], free=100) == 0


def test_the_layers_after_the_first_are_not_checkpointed(make_model):
    model = make_model("llama", num_hidden_layers=3)
    checkpoint_activations(model)
    CheckpointFirstLayers(2).on_train_begin(None, None, None, model=model)
    assert [layer.gradient_checkpointing for layer in checkpointable_layers(model)] == [True, True, False]
    assert checkpointable_layers(model) == list(model.model.layers)
