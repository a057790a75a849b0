"""Images in every layout: log-probabilities and gradients are those of a plain forward over one sequence."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.vision.support import FAMILIES, Tiny, picture
from trl.data.layout import lay_out
from trl.models.image_features import ImageFeatures, encoder_parameters
from trl.models.score import score
from trl.models.value_heads.auto_models import with_value_head
from trl.types import Completion, Example
from trl.vision.blank import blank_image
from trl.vision.families import family_of, joins_of
from trl.vision.processing import ImageProcessing

LAYOUTS = ("padded", "packed", "shared")
ANSWERS = (Completion([20, 21, 22]), Completion([30, 31, 32, 33, 34]))


@pytest.fixture(scope="module")
def tiny_of():
    """Each family's model and processor, made once."""
    made: dict[str, Tiny] = {}
    return lambda name: made.setdefault(name, FAMILIES[name]()) if name not in made else made[name]


def example_of(tiny: Tiny, text: str, images: list, completions=ANSWERS) -> Example:
    """A prompt whose images stand where `text` has a *."""
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    expanded, _ = processing.expand(text.replace("*", processing.place), images)
    ids = tiny.processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    return processing.with_images(Example(ids, tuple(completions)), images)


def rows_of(tiny: Tiny) -> list[Example]:
    """One, two and no images, and a text."""
    one = example_of(tiny, "*see this", [picture(1)])
    two = example_of(tiny, "a* b* c", [picture(2, 24, 40), picture(3, 32, 16)])
    none = example_of(tiny, "no image", [], ANSWERS[:1])
    rows = [one, none] if tiny.model.config.model_type == "paligemma" else [one, two, none]
    return [*rows, Example([], (Completion([40, 41, 42, 43]),))]


def plain_inputs(tiny: Tiny, example: Example, completion: Completion) -> dict[str, torch.Tensor]:
    """What the model is given in a plain forward over one sequence, as its own processor would give it."""
    ids = torch.tensor([[*example.prompt, *completion.ids]])
    inputs = {"input_ids": ids, **example.inputs}
    family, length = family_of(tiny.model.config), ids.shape[1]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            rest = 1 if family.sees_ahead == "prompt" else 0
            inputs[name] = torch.tensor([[*inputs[name].tolist()[:length]] + [rest] * (length - len(inputs[name]))])
    if family.sees_ahead == "prompt" and not example.inputs:
        inputs["token_type_ids"] = torch.ones_like(ids)
    return inputs


def plain_logprobs(tiny: Tiny, example: Example, completion: Completion) -> torch.Tensor:
    """Log-probabilities `[C]`; M-RoPE positions are the model's own."""
    inputs = plain_inputs(tiny, example, completion)
    logits = tiny.model(**inputs).logits[0, :-1]
    found = logits.log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    return found[len(example.prompt) - 1 :] if example.prompt else torch.cat([torch.zeros(1), found])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_gives_the_numbers_of_plain_forwards(tiny_of, name):
    tiny = tiny_of(name)
    rows, model = rows_of(tiny), tiny.model
    sequences = [(example, completion) for example in rows for completion in example.completions]
    expected = torch.zeros(len(sequences), 5)
    for n, (example, completion) in enumerate(sequences):
        expected[n, : len(completion)] = plain_logprobs(tiny, example, completion)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    plain = torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True)
    for layout in tiny.layouts:
        batch = lay_out(rows, layout, capacity=150, joins=joins_of(model.config))
        found = score(model, batch).logprobs
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, at=layout: f"{at}: {m}")
        ours = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
        for mine, theirs in zip(ours, plain, strict=True):
            scale = 0 if theirs is None else theirs.abs().max().item()
            if scale > 1e-6:
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * scale)


def with_adapter_and_values(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model with LoRA on the language layers and a value head, none of them zero."""
    torch.manual_seed(1)
    targets = r".*(language_model|text_model|model\.layers).*\.(q|v)_proj"
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    wrapped = with_value_head(get_peft_model(copy.deepcopy(model), config)).eval()
    for parameter in wrapped.v_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


def plain_numbers(wrapped: torch.nn.Module, tiny: Tiny, example: Example, completion: Completion) -> torch.Tensor:
    """Log-probabilities and values `[2,C]` of a plain forward over one sequence."""
    inputs = plain_inputs(tiny, example, completion)
    logits, _, values = wrapped(**inputs)
    told = logits[0, :-1].log_softmax(-1).gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    found = torch.stack([told, values[0, :-1]])
    return found[:, len(example.prompt) - 1 :] if example.prompt else torch.cat([torch.zeros(2, 1), found], 1)


USUAL = ("llava", "qwen2_5_vl", "gemma3", "paligemma")
"""One family of each kind of positions and masks."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.long) for n in FAMILIES])
def test_adapters_and_value_heads_in_every_layout(tiny_of, name):
    tiny = tiny_of(name)
    rows, wrapped, plain = rows_of(tiny), *(with_adapter_and_values(tiny.model) for _ in range(2))
    sequences = [(example, completion) for example in rows for completion in example.completions]
    expected = torch.zeros(2, len(sequences), 5)
    for n, (example, completion) in enumerate(sequences):
        expected[:, n, : len(completion)] = plain_numbers(plain, tiny, example, completion)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [p for p in plain.parameters() if p.requires_grad])
    assert sum(gradient.abs().max() > 1e-3 for gradient in wanted) > len(wanted) / 2
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    for layout in tiny.layouts:
        batch = lay_out(rows, layout, capacity=150, joins=joins_of(tiny.model.config))
        scores = score(wrapped, batch, want=("value",))
        found = torch.stack([scores.logprobs, scores.value])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, at=layout: f"{at}: {m}")
        for mine, theirs in zip(torch.autograd.grad((found * weights).sum(), trained), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * max(theirs.abs().max().item(), 1e-2))


@pytest.mark.parametrize("name", FAMILIES)
def test_images_matter(tiny_of, name):
    tiny = tiny_of(name)
    joins = joins_of(tiny.model.config)
    with torch.no_grad():
        one, other = (
            score(tiny.model, lay_out([example_of(tiny, "*see", [picture(s)])], joins=joins)).logprobs for s in (1, 5)
        )
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_features_kept_of_images_stand_for_their_pixels(tiny_of, name):
    tiny = tiny_of(name)
    rows, joins = rows_of(tiny), joins_of(tiny.model.config)
    kept = with_features(tiny.model, rows)
    assert not any("pixel_values" in example.inputs for example in kept)
    for layout in tiny.layouts:
        with torch.no_grad():
            read, stood_in = (score(tiny.model, lay_out(own, layout, joins=joins)).logprobs for own in (rows, kept))
        torch.testing.assert_close(stood_in, read, rtol=1e-5, atol=1e-5)


def with_features(model, rows: list[Example]) -> list[Example]:
    """The rows as a model with a frozen encoder is given them; the model trains again afterwards."""
    encoder = list(encoder_parameters(model).values())
    for parameter in encoder:
        parameter.requires_grad_(False)
    try:
        features = ImageFeatures(model, 2**20)
        if "this release" in features.why_not:
            pytest.skip(features.why_not)
        return features.of(rows)
    finally:
        for parameter in encoder:
            parameter.requires_grad_(True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_blank_image_changes_nothing_but_that_the_encoder_runs(tiny_of, name):
    """As processes without an image read one under FSDP2, ZeRO-3 and DDP: gradients are there, and zero."""
    tiny = tiny_of(name)
    batch = lay_out([Example([], (Completion([40, 41, 42, 43]),))], joins=joins_of(tiny.model.config))
    blank = blank_image(ImageProcessing.of(tiny.processor, tiny.model.config))
    together = replace(batch, inputs={**batch.inputs, **blank})
    found = score(tiny.model, together).logprobs
    torch.testing.assert_close(found, score(tiny.model, batch).logprobs, rtol=0, atol=0)
    encoder = [p for p in encoder_parameters(tiny.model).values() if p.requires_grad]
    gradients = [g for g in torch.autograd.grad(found.sum(), encoder, allow_unused=True) if g is not None]
    assert len(gradients) > len(encoder) / 2
    assert not any(g.any() for g in gradients)
