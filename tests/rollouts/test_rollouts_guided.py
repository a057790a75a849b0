"""Samples guided by Q-values, and masks of transitions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from trl.errors import ConfigError, ModelError
from trl.models.value_heads.ilql import with_ilql_heads
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams

VOCABULARY = 99
PROMPTS = [Prompt([5, 9, 11, 30]), Prompt([7]), Prompt([12, 13, 14, 15, 16, 17])]


def make_guided(make_model, name):
    wrapped = with_ilql_heads(make_model(name, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in wrapped.v_head.target_qs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    wrapped.pretrained_model.generation_config.forced_eos_token_id = None
    return wrapped.eval()


@torch.no_grad()
def step_by_step(wrapped, prompt, length, beta):
    """Greedy tokens, each from a whole forward pass: argmax of log π + β (min Q′ − V)."""
    inner, ids = wrapped.pretrained_model, []
    for _ in range(length):
        if inner.config.is_encoder_decoder:
            start = inner.generation_config.decoder_start_token_id
            inputs = {"input_ids": torch.tensor([prompt.ids]), "decoder_input_ids": torch.tensor([[start, *ids]])}
        else:
            inputs = {"input_ids": torch.tensor([[*prompt.ids, *ids]])}
        with wrapped.v_head.states(inner, inputs) as states:
            logits, state = inner(**inputs).logits[0, -1], states()[0, -1]
        qs = torch.stack([head(state) for head in wrapped.v_head.target_qs]).amin(0)
        ids.append(int((logits.log_softmax(-1) + beta * (qs - wrapped.v_head(state))).argmax()))
    return ids


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "mamba", "t5"])
def test_greedy_samples_follow_policy_and_values_together(make_model, name):
    wrapped = make_guided(make_model, name)
    params = SamplingParams(temperature=0, beta=0.5, max_new_tokens=6, ignore_eos=True)
    found = LocalEngine(wrapped, progress=False).generate(PROMPTS, params, n=1)
    assert [list(each[0].ids) for each in found] == [step_by_step(wrapped, prompt, 6, 0.5) for prompt in PROMPTS]


def test_without_beta_nothing_guides(make_model):
    wrapped = make_guided(make_model, "gpt2")
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    own = LocalEngine(wrapped, progress=False).generate(PROMPTS, params, n=1)
    assert own == LocalEngine(wrapped.pretrained_model, progress=False).generate(PROMPTS, params, n=1)


def test_the_distribution_is_that_of_the_formula(make_model):
    """softmax(topk(log π + β (min Q′ − V)) / τ) of 4,000 first tokens."""
    wrapped = make_guided(make_model, "gpt2")
    params = SamplingParams(temperature=2.0, top_k=4, beta=0.3, max_new_tokens=1, seed=5)
    sampled = LocalEngine(wrapped, progress=False).generate(PROMPTS[:1], params, n=4000)[0]
    with torch.no_grad(), wrapped.v_head.states(wrapped.pretrained_model, {}) as states:
        logits = wrapped.pretrained_model(input_ids=torch.tensor([PROMPTS[0].ids])).logits[0, -1]
        scores = logits.log_softmax(-1) + 0.3 * wrapped.v_head.action_values(states()[0, -1:])[0]
    best = scores.topk(4)
    expected = torch.zeros(VOCABULARY).scatter(0, best.indices, (best.values / 2.0).softmax(-1))
    counted = torch.bincount(torch.tensor([rollout.ids[0] for rollout in sampled]), minlength=VOCABULARY) / 4000
    assert (counted - expected).abs().max() < 0.04


def test_log_probabilities_stay_those_of_the_policy(make_model):
    wrapped = make_guided(make_model, "gpt2")
    params = SamplingParams(beta=3.0, max_new_tokens=1, seed=5)
    (rollout,) = LocalEngine(wrapped, progress=False).generate(PROMPTS[:1], params, n=1)[0]
    with torch.no_grad():
        logits = wrapped.pretrained_model(input_ids=torch.tensor([PROMPTS[0].ids])).logits[0, -1]
    assert rollout.logprobs[0] == pytest.approx(logits.log_softmax(-1)[rollout.ids[0]].item(), abs=1e-4)


def test_what_a_mask_forbids_is_never_sampled(make_model):
    """A token may be followed by the next two alone."""
    following = torch.arange(VOCABULARY)
    mask = torch.ones(VOCABULARY, VOCABULARY, dtype=torch.bool)
    mask[following, (following + 1) % VOCABULARY] = False
    mask[following, (following + 2) % VOCABULARY] = False
    params = SamplingParams(logit_mask=mask, max_new_tokens=20, ignore_eos=True, seed=1)
    found = LocalEngine(make_model("llama"), progress=False).generate(PROMPTS, params, n=3)
    for prompt, rollouts in zip(PROMPTS, found, strict=True):
        for rollout in rollouts:
            tokens = [prompt.ids[-1], *rollout.ids]
            assert {(b - a) % VOCABULARY for a, b in pairwise(tokens)} <= {1, 2}


def test_guidance_needs_q_heads(make_model):
    with pytest.raises(
        ModelError, match="beta=1.0 guides samples by Q-values, and this GPT2LMHeadModel has no Q heads"
    ):
        LocalEngine(make_model("gpt2")).generate(PROMPTS, SamplingParams(beta=1.0))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(3, 4, dtype=torch.bool), r"logit_mask has shape \(3, 4\) .* give \[V,V\] of bool"),
        (torch.zeros(3, 3), "dtype torch.float32"),
        (torch.tensor([[False, True], [True, True]]), "forbids every token after token 1"),
    ],
)
def test_masks_that_cannot_be_used(mask, words):
    with pytest.raises(ConfigError, match=words):
        SamplingParams(logit_mask=mask)


def test_a_mask_is_of_the_model_s_vocabulary(make_model):
    params = SamplingParams(logit_mask=torch.zeros(5, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"logit_mask is \(5, 5\), but the model's vocabulary has 99 tokens"):
        LocalEngine(make_model("gpt2")).generate(PROMPTS, params)


def test_beams_are_not_guided(make_model):
    from transformers import GenerationConfig

    params = SamplingParams(beta=1.0, generation_config=GenerationConfig(num_beams=2))
    wrapped = make_guided(make_model, "gpt2")
    with (
        pytest.warns(UserWarning, match="num_beams"),
        pytest.raises(ConfigError, match="beta works only in the engine's own"),
    ):
        LocalEngine(wrapped, progress=False).generate(PROMPTS, params)
