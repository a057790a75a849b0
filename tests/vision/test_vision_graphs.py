"""Layers between images and a head, replayed: numbers and gradients are those of the layers, whoever trains the image encoder."""

from __future__ import annotations

import copy

import pytest

from tests.models.test_models_graphs import Recorder, assert_same, rows, step
from tests.vision.support import FAMILIES, Tiny
from tests.vision.test_vision_layouts import rows_of
from trl.data.layout import lay_out
from trl.models.graphs import capture_layers
from trl.models.image_features import ImageFeatures, encoder_parameters
from trl.models.score import prepare_scoring
from trl.models.varlen import VARLEN, switch
from trl.types import Batch, Example
from trl.vision.families import joins_of


def captured(tiny: Tiny) -> tuple:
    """A model whose layers are recorded, the same model without, and the recorder."""
    model, recorder = tiny.model, Recorder()
    prepare_scoring(model)
    switch(model, VARLEN)
    plain = copy.deepcopy(model)
    capture_layers(model, recorder)
    return model, plain, recorder


def batch_of(tiny: Tiny, examples: list[Example], layout: str = "packed") -> Batch:
    options = {"capacity": 2**40, "spans": True, "in_few_shapes": lambda n: True}
    return lay_out(examples, layout, joins=joins_of(tiny.model.config), **options)


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_replays_have_the_numbers_and_gradients_of_layers(name, is_frozen):
    """A frozen encoder's features are an input of the batch; one that is trained gets its gradient through the replay."""
    tiny = FAMILIES[name]()
    model, plain, recorder = captured(tiny)
    for parameter in [p for each in (model, plain) for p in encoder_parameters(each).values()]:
        parameter.requires_grad_(not is_frozen)
    features = ImageFeatures(model, 2**30)
    if is_frozen and features.why_not:
        pytest.skip(features.why_not)
    for number, layout in enumerate(["packed", "shared"] * 3):
        examples = features.of(rows_of(tiny)[: 3 + number // 2 % 2])  # with and without the text at the end
        batch = batch_of(tiny, examples, layout)
        assert ("pixel_values" in batch.inputs) != is_frozen
        assert_same(step(model, batch), step(plain, batch))
    assert recorder.replays >= 6


def test_features_of_lower_layers_are_added_by_layers(caplog):
    """They have another shape in every batch."""
    tiny = FAMILIES["qwen3_vl"]()
    model, plain, recorder = captured(tiny)
    for _ in range(3):
        batch = batch_of(tiny, rows_of(tiny))
        assert_same(step(model, batch), step(plain, batch))
    (record,) = caplog.records
    assert "runs without CUDA graphs" in record.message
    assert "'deepstack_visual_embeds'" in record.message
    assert recorder.recorded == 0


def test_texts_of_a_model_that_makes_masks_by_kind_of_layer():
    tiny = FAMILIES["gemma3"]()
    model, plain, recorder = captured(tiny)
    for number in range(3):
        batch = batch_of(tiny, rows(number, 10 + number))
        assert_same(step(model, batch), step(plain, batch))
    assert recorder.recorded == 2
