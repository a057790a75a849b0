"""Sampling after images: log-probabilities are those of plain forwards, and image tokens are never sampled."""

from __future__ import annotations

import pytest
import torch

from tests.vision.support import FAMILIES, picture
from tests.vision.test_vision_layouts import example_of, plain_inputs, plain_logprobs
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Completion, Example
from trl.vision.families import image_token_ids


def prompts_of(tiny) -> list[Example]:
    one = example_of(tiny, "*see this", [picture(1)], ())
    if tiny.model.config.model_type == "paligemma":
        return [one]
    two = example_of(tiny, "a* b* c", [picture(2, 24, 40), picture(3, 32, 16)], ())
    return [one, two, example_of(tiny, "no image", [], ())]


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_have_the_log_probabilities_of_plain_forwards(name):
    tiny = FAMILIES[name]()
    prompts = prompts_of(tiny)
    params = SamplingParams(max_new_tokens=4, seed=1, ignore_eos=True)
    found = LocalEngine(tiny.model, progress=False).generate([Prompt.of(e) for e in prompts], params, 2)
    for example, samples in zip(prompts, found, strict=True):
        for sample in samples:
            with torch.no_grad():
                expected = plain_logprobs(tiny, example, Completion(sample.ids))
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_samples_are_those_of_generate(name):
    """Prompts with one, two and no images are sampled together; `generate` reads one at a time, and counts positions itself."""
    tiny = FAMILIES[name]()
    prompts = prompts_of(tiny)
    params = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    found = LocalEngine(tiny.model, progress=False).generate([Prompt.of(e) for e in prompts], params, 1)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    banned = image_token_ids(tiny.model.config)
    for example, (sample,) in zip(prompts, found, strict=True):
        inputs = plain_inputs(tiny, example, Completion([]))
        (expected,) = tiny.model.generate(**inputs, **options, suppress_tokens=banned).tolist()
        assert list(sample.ids) == expected[len(example.prompt) :]


def test_image_tokens_are_never_sampled():
    """Not even where the model finds nothing else likely; the log-probabilities are of the model as it is."""
    tiny = FAMILIES["llava"]()
    (banned,) = image_token_ids(tiny.model.config)
    with torch.no_grad():
        tiny.model.lm_head.weight[banned] = 0
        tiny.model.lm_head.weight.mul_(0.01)
    head = tiny.model.lm_head
    hook = head.register_forward_hook(
        lambda module, args, out: out.index_add(-1, torch.tensor([banned]), out[..., :1] * 0 + 30)
    )
    engine = LocalEngine(tiny.model, progress=False)
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_new_tokens=5, temperature=temperature, seed=1, ignore_eos=True)
        ((sample,),) = engine.generate([Prompt.of(prompts_of(tiny)[0])], params, 1)
        assert banned not in sample.ids
        assert max(sample.logprobs) < -20
    hook.remove()


def test_a_prompt_that_ends_in_an_image():
    tiny = FAMILIES["llava"]()
    example = example_of(tiny, "see*", [picture(1)], ())
    params = SamplingParams(max_new_tokens=3, seed=1, ignore_eos=True)
    ((sample,),) = LocalEngine(tiny.model, progress=False).generate([Prompt.of(example)], params, 1)
    with torch.no_grad():
        expected = plain_logprobs(tiny, example, Completion(sample.ids))
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=1e-3, atol=1e-4)
