"""Rotary embeddings whose frequencies depend on the length of a sequence: its own, whatever is beside it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from tests.conftest import WIDTHS
from trl.data.layout import lay_out
from trl.models.layouts import choose_layout, why_not
from trl.models.rotary import first_length, length_dependent, lengths_of
from trl.models.score import prepare_scoring, score
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.types import Completion, Example

FIRST = 8
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


def longrope():
    options = {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": FIRST,
        "rope_scaling": dict(LONG_ROPE),
    }
    return Phi3ForCausalLM(Phi3Config(**WIDTHS, **options))


def dynamic():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, max_position_embeddings=FIRST, rope_scaling=scaling))


MODELS = {"longrope": longrope, "dynamic": dynamic}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def examples():
    """Three short sequences, and two long ones of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (5, 20, 8, 13, 3)]
    return [Example([], (Completion(each),)) for each in ids]


def alone(model, example):
    """Log-probabilities by transformers itself, of a model that has seen nothing before."""
    (completion,) = example.completions
    ids = torch.tensor([list(completion.ids)])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None]).squeeze(1)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_sequence_has_its_own_frequencies(name, layout):
    with torch.no_grad():
        expected = [alone(make(name), example) for example in examples()]
        model = make(name)
        for _ in range(2):  # the second time, it has seen long ones
            found = score(model, lay_out(examples(), layout, capacity=32, restarts=True)).logprobs
            for row, own in zip(found, expected, strict=True):
                torch.testing.assert_close(row[1 : len(own) + 1], own, rtol=1e-4, atol=1e-4)


def test_padding_does_not_make_a_sequence_longer():
    (short, *_) = examples()
    model = make("longrope")
    with torch.no_grad():
        wide = lay_out([short, examples()[2]], "packed", capacity=FIRST, multiple_of=32, restarts=True)
        found = score(model, wide).logprobs[0, 1:5]
    torch.testing.assert_close(found, alone(make("longrope"), short), rtol=1e-4, atol=1e-4)


def test_runs_of_rising_positions_are_sequences():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [4, 5, 6, 7, 8, 9, 10]])
    assert lengths_of(positions).tolist() == [[3, 3, 3, 2, 2, 1, 1], [11] * 7]


@pytest.mark.parametrize("name", MODELS)
def test_layouts_that_share_a_prompt_are_not_taken(name):
    model = make(name)
    assert length_dependent(model.config) == name
    assert first_length(model.config) == FIRST
    assert name in why_not(model, "shared")
    assert choose_layout(model, multiple_completions=True) == "packed"


def test_other_models_are_left_as_they_are(make_model):
    model = make_model("llama")
    prepare_scoring(model)
    assert not length_dependent(model.config)
    assert "forward" not in vars(model.model.rotary_emb)


def test_samples_of_long_prompts_and_of_short_ones_are_scored_as_they_were_drawn():
    model = make("longrope")
    engine = LocalEngine(model, progress=False)
    short, long = [5, 9, 4], [7, 3, 8, 20, 11, 6, 9, 15, 33, 41]
    found = engine.generate(
        [Prompt(short), Prompt(long)], SamplingParams(max_new_tokens=5, seed=0, ignore_eos=True), n=2
    )
    for prompt, rollouts in zip((short, long), found, strict=True):
        for rollout in rollouts:
            with torch.no_grad():
                batch = lay_out([Example(prompt, (Completion(rollout.ids),))])
                again = score(model, batch).logprobs[0, : len(rollout.ids)]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), again, rtol=1e-4, atol=1e-4)


def test_a_sequence_that_grows_long_is_left_to_generate():
    engine = LocalEngine(make("longrope"), progress=False)
    with pytest.warns(UserWarning, match="longrope"):
        ((rollout,),) = engine.generate(
            [Prompt([5, 9, 4])], SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True)
        )
    model, ids = make("longrope"), [5, 9, 4]
    with torch.no_grad():
        for token in rollout.ids:  # each by the frequencies of the sequence so far
            assert model(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)
