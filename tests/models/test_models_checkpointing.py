"""Which layers are checkpointed, and what the others keep."""

import pytest
import torch
from torch import nn

from trl.models.checkpointing import (
    ChecksFirstLayers,
    checkpoint_activations,
    checkpointable_layers,
    kept_for_backward,
    layers_to_recompute,
)


@pytest.mark.parametrize(
    ("free", "count"),
    # A layer saves (130 − 10) / 4 = 30 of 130 bytes.
    [(200, 0), (130, 0), (129, 1), (100, 1), (99, 2), (40, 3), (39, 4), (10, 4), (0, 4)],
)
def test_as_few_layers_as_memory_asks_for(free, count):
    assert layers_to_recompute(kept=130, recomputed=10, free=free, layers=4) == count


def test_what_is_kept_for_backward_by_hand():
    """Of rows of 3 through 3 → 5, tanh and 5 → 2, in float32: the input, and the tanh's output once, which two operations read."""
    net, x = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)), torch.ones(7, 3)
    with torch.no_grad():
        assert kept_for_backward(lambda: net(x), net.parameters()) == 4 * (7 * 3 + 7 * 5)
    assert kept_for_backward(lambda: net(x), [*net.parameters(), x]) == 4 * 7 * 5
    assert kept_for_backward(lambda: net(x), []) == 4 * (7 * 3 + 7 * 5 + 5 * 2)  # the first weight is not needed
    assert kept_for_backward(lambda: net.requires_grad_(False)(x), []) == 0


def test_the_layers_after_the_first_are_not_checkpointed(make_model):
    model = make_model("llama", num_hidden_layers=3)
    checkpoint_activations(model)
    ChecksFirstLayers(2).on_train_begin(None, None, None, model=model)
    assert [layer.gradient_checkpointing for layer in checkpointable_layers(model)] == [True, True, False]
    assert checkpointable_layers(model) == list(model.model.layers)
