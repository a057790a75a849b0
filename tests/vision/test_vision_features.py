"""A frozen image encoder reads an image once, within a bound on memory, and only where all readers share it."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig

from tests.pretended_cuda import pretended_cuda
from tests.vision.support import llava, picture
from tests.vision.test_vision_layouts import example_of
from tests.vision.test_vision_training import LORA, history, rows, trainer_of
from trl.models.image_features import ImageFeatures, encoder_parameters
from trl.models.score import unwrap

IMAGES = 4
"""Images of `rows`: one, one, none and two."""


@pytest.fixture(autouse=True, scope="module")
def features_are_taken() -> None:
    """By models of this release of transformers."""
    if "this release" in (why_not := ImageFeatures(frozen(llava().model), 1).why_not):
        pytest.skip(why_not)


def count_images(model) -> list[int]:
    """A list that gets how many images each pass of the image encoder reads."""
    passes: list[int] = []
    tower = unwrap(model).model.vision_tower
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len((args or [kwargs["pixel_values"]])[0])), with_kwargs=True
    )
    return passes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"precompute_ref_log_probs": True}),
        ("grpo", {"beta": 0.1, "num_iterations": 2, "num_generations": 2, "per_device_train_batch_size": 8}),
    ],
)
def test_every_image_is_encoded_once(tmp_path, name, options):
    """By policy, reference, sampler and all epochs together."""
    data = rows({"dpo": "pairs", "grpo": "prompts"}[name])
    own = {"max_steps": 3, "peft_config": LoraConfig(**LORA), **options}
    trainer = trainer_of(name, tmp_path, llava(), data, **own)
    trainer.train()
    assert (
        trainer.image_features.encoded == 3
    )  # prompts with images; a reference's may be computed when the trainer is made


def test_kept_features_change_nothing_else(tmp_path):
    found, passes = {}, {}
    for room in (0, 16):
        own = {"peft_config": LoraConfig(**LORA), "image_features_mb": room, "layout": "padded"}
        trainer = trainer_of("dpo", tmp_path, llava(), rows("pairs"), **own)
        passes[room] = count_images(trainer.model)
        found[room] = history(trainer)
    assert found[16] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert sum(passes[16]) == IMAGES
    assert sum(passes[0]) == 2 * 2 * 2 * IMAGES  # steps, policy and reference, chosen and rejected


def frozen(model):
    for parameter in encoder_parameters(model).values():
        parameter.requires_grad_(False)
    return model


def test_images_used_longest_ago_make_room():
    tiny = llava()
    one, other = (example_of(tiny, "*see", [picture(seed)]) for seed in (1, 5))
    size = 4 * 32 * 4  # tokens of an image, hidden size, bytes of a float
    for room, expected in ((2 * size, 2), (2 * size - 1, 4)):
        features = ImageFeatures(frozen(tiny.model), room)
        for example in (one, other, one, other):
            features.of([example])
        assert features.encoded == expected


def test_one_image_of_two_questions_is_encoded_once():
    tiny = llava()
    features = ImageFeatures(frozen(tiny.model), 2**20)
    features.of([example_of(tiny, "*see", [picture(1)]), example_of(tiny, "say what*", [picture(1)])])
    assert features.encoded == 1


@pytest.mark.parametrize(
    ("device", "deterministic", "expected"),
    [("cpu", False, [2, 1]), ("cuda", False, [3]), ("cuda", True, [2, 1])],
    ids=["cpu", "cuda", "cuda, deterministic"],
)
def test_images_are_encoded_prompt_by_prompt_where_results_are_exact(monkeypatch, device, deterministic, expected):
    """Beside other images they are rounded otherwise, and a resumed run, whose cache is empty, has others beside them."""
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: deterministic)
    with pretended_cuda() if device == "cuda" and not torch.cuda.is_available() else nullcontext():
        tiny = llava()
        tiny.model.to(device)
        passes, features = count_images(tiny.model), ImageFeatures(frozen(tiny.model), 2**20)
        features.of([example_of(tiny, "*see*", [picture(1), picture(2)]), example_of(tiny, "*see", [picture(5)])])
        assert passes == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_images_are_encoded_a_few_prompts_at_a_time(monkeypatch):
    monkeypatch.setattr("trl.models.image_features.AT_ONCE", 2)
    with pretended_cuda():
        tiny = llava()
        tiny.model.to("cuda")
        passes, features = count_images(tiny.model), ImageFeatures(frozen(tiny.model), 2**20)
        features.of([example_of(tiny, "*see", [picture(number)]) for number in range(5)])
    assert passes == [2, 2, 1]


def test_an_encoder_that_is_trained_reads_every_time():
    tiny = llava()
    example, features = example_of(tiny, "*see", [picture(1)]), ImageFeatures(frozen(tiny.model), 2**20)
    assert "pixel_values" not in features.of([example])[0].inputs
    next(tiny.model.model.multi_modal_projector.parameters()).requires_grad_(True)
    assert features.of([example])[0].inputs is example.inputs


def test_a_reference_with_an_encoder_of_its_own_reads_for_itself():
    model = frozen(llava().model)
    reference = copy.deepcopy(model)
    assert ImageFeatures(model, 1, lambda: [reference]).why_not == ""
    with torch.no_grad():
        next(iter(encoder_parameters(reference).values())).add_(1)
    assert "of its own" in ImageFeatures(model, 1, lambda: [reference]).why_not
