"""The draw of one token: random numbers, inverse distribution function, truncations, penalties, parameters."""

import math

import pytest
import torch
from transformers import ByT5Tokenizer, GenerationConfig
from transformers.generation import RepetitionPenaltyLogitsProcessor

from trl.errors import ConfigError, DataError
from trl.rollouts.sampling import (
    SamplingParams,
    asked_limit,
    ban,
    chosen_logprobs,
    draw,
    inverse_cdf,
    penalize,
    stream,
    uniform,
    with_banned,
    with_limit,
    with_seed,
    with_stop_tokens,
)
from trl.rollouts.stopping import Stopper


def key(seed=0, prompt=0, sample=0):
    return stream(seed, torch.tensor([prompt]), torch.tensor([sample]))


def numbers(count, seed=0):
    return uniform(key(seed).expand(count), torch.arange(count))


def frequencies(logits, params, count=20_000):
    tokens = draw(torch.tensor(logits).expand(count, -1), params, numbers(count))
    return torch.bincount(tokens, minlength=len(logits)).double() / count


def chi_square(observed, expected, count=20_000):
    kept = expected > 0
    assert observed[~kept].sum() == 0
    return float((count * (observed[kept] - expected[kept]) ** 2 / expected[kept]).sum())


def test_splitmix_matches_its_published_first_output():
    """SplitMix64 seeded with 0 gives 0xE220A8397B1DCDAF first; a zero key at position 0 is that state."""
    u = uniform(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert u.item() == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_uniform_numbers_are_uniform_and_independent():
    u = numbers(100_000)
    assert ((u >= 0) & (u < 1)).all()
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / 1e5)
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # 99.9 % of chi-square with 99 degrees of freedom
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.013


def test_streams_differ_by_seed_prompt_and_sample():
    keys = [key(s, p, i).item() for s in (0, 1, -1, 2**63) for p in range(5) for i in range(5)]
    assert len(set(keys)) == len(keys)
    together = stream(3, torch.tensor([0, 7, 7]), torch.tensor([0, 1, 2]))
    assert together.tolist() == [key(3, 0, 0).item(), key(3, 7, 1).item(), key(3, 7, 2).item()]


def test_inverse_cdf_by_hand():
    weights = torch.tensor([[1.0, 0, 2, 1]]).expand(6, -1)
    u = torch.tensor([0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.double)
    assert inverse_cdf(weights, u).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_inverse_cdf_equals_the_plain_search_of_the_cumulative_sum(vocabulary):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, vocabulary, generator=generator) ** 8
    u = torch.rand(200, dtype=torch.double, generator=generator)
    cumulative = weights.double().cumsum(-1)
    plain = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(inverse_cdf(weights, u), plain)


def test_a_token_of_no_weight_is_never_drawn():
    weights = torch.zeros(3, 600)
    weights[:, 300] = 1e-30
    assert inverse_cdf(weights, torch.tensor([0, 0.5, 1 - 2**-53], dtype=torch.double)).tolist() == [300] * 3


LOGITS = [math.log(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        ({"top_k": 2}, [4, 3, 0, 0, 0]),
        ({"top_k": 50}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.69}, [4, 3, 0, 0, 0]),
        ({"top_p": 0.71}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [4, 3, 0, 0, 0]),  # 0.4 + 0.3 of the 0.85 that top-k leaves is 0.82
        ({"top_p": 0.99, "min_p": 0.5}, [4, 3, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
    ],
)
def test_distribution(params, expected):
    expected = torch.tensor(expected, dtype=torch.double)
    observed = frequencies(LOGITS, SamplingParams(**params))
    assert chi_square(observed, expected / expected.sum()) < 18.5  # 99.9 % with four degrees of freedom


def test_a_wide_nucleus_is_sorted_whole():
    """1,000 equally likely tokens and a top-p that needs 900 of them, beside a row of which one is enough."""
    logits = torch.zeros(5000, 1000)
    logits[0, 0] = 100
    tokens = draw(logits, SamplingParams(top_p=0.9), numbers(5000))
    assert len(tokens.unique()) > 850
    assert tokens.max() < 901


@pytest.mark.parametrize(
    ("params", "last"),
    [({"top_p": 0.5}, 0), ({"min_p": 1.0}, 1), ({"min_p": 1.0, "top_p": 0.99}, 1), ({"min_p": 1.0, "top_k": 2}, 1)],
)
def test_bounds_that_two_equal_tokens_just_reach(params, last):
    """The first alone reaches a mass of one half; the second is as likely as the most likely one."""
    u = torch.tensor([1 - 2**-53], dtype=torch.double)
    assert draw(torch.zeros(1, 2), SamplingParams(**params), u).item() == last


def test_penalty_by_hand_and_as_in_transformers():
    logits = torch.tensor([[2.0, -2, 4, 1]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1, -4, 4, 1]]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[0, 1, 1]]), logits.clone())
    torch.testing.assert_close(penalize(logits, seen, 1.3), theirs)


def test_ban_touches_its_rows_alone():
    banned = ban(torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([True, False]))
    assert banned.tolist() == [[-math.inf, 1, -math.inf], [1, 1, 1]]


def test_logprob_is_of_the_tempered_policy():
    """Logits ln 1 and ln 3 at temperature 1/2 are 1 to 9."""
    logits = torch.tensor([[0.0, math.log(3)]])
    assert chosen_logprobs(logits, torch.tensor([1]), 0.5).item() == pytest.approx(math.log(0.9))
    assert chosen_logprobs(logits, torch.tensor([1]), 0).item() == pytest.approx(math.log(0.75))


def test_without_a_seed_torch_gives_one():
    torch.manual_seed(1)
    first = with_seed(SamplingParams()).seed
    assert with_seed(SamplingParams()).seed != first
    torch.manual_seed(1)
    assert with_seed(SamplingParams()).seed == first
    assert with_seed(SamplingParams(seed=4)).seed == 4


def test_generation_config_becomes_parameters():
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=5,
        stop_strings="\n",
        max_new_tokens=9,
        eos_token_id=3,
        bad_words_ids=[[1]],
    )
    params = SamplingParams.from_generation_config(config, top_p=0.9)
    assert (params.temperature, params.top_k, params.top_p, params.max_new_tokens) == (0.7, 5, 0.9, 9)
    assert params.stop == ("\n",)
    assert (params.stop_token_ids, params.ignore_eos) == ((3,), True), "the model's own end nothing then"
    assert params.generation_config.bad_words_ids == [[1]]
    assert config.top_k == 5
    assert SamplingParams.from_generation_config(GenerationConfig(temperature=0.7)).greedy
    assert not SamplingParams.from_generation_config(GenerationConfig()).ignore_eos
    assert SamplingParams.from_generation_config(GenerationConfig(max_length=33)).max_new_tokens == 33
    both = SamplingParams.from_generation_config(GenerationConfig(max_length=33, max_new_tokens=9))
    assert (both.max_new_tokens, both.generation_config.max_length) == (9, None)


def test_limits_of_prompts():
    params = SamplingParams(min_new_tokens=4, max_new_tokens=8)
    assert [asked_limit(params, [5], own, 0) for own in (None, 3, 99)] == [8, 3, 8]
    shorter = with_limit(params, 3)
    assert (shorter.min_new_tokens, shorter.max_new_tokens) == (3, 3)
    with pytest.raises(DataError, match=r"prompts\[2\] has max_new_tokens=0"):
        asked_limit(params, [5], 0, 2)


def test_all_ends_of_model_and_tokenizer_stop(make_model, tokenizer):
    model = make_model("llama")
    for eos, expected in (([7, 8], (2, 7, 8, 9)), (7, (2, 7, 9)), (None, (2, 9))):
        model.generation_config.eos_token_id = eos
        assert with_stop_tokens(SamplingParams(stop_token_ids=9), model, tokenizer).stop_token_ids == expected
    ignoring = SamplingParams(stop_token_ids=9, ignore_eos=True)
    assert with_stop_tokens(ignoring, model, tokenizer).stop_token_ids == (9,)


def test_tokens_are_banned_besides_those_that_are():
    assert with_banned(SamplingParams(banned_tokens=(4,)), [2, 4]).banned_tokens == (2, 4)


def test_a_token_that_nothing_may_follow():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[:, 2] = True
    SamplingParams(logit_mask=mask)
    with pytest.raises(ConfigError, match="forbids every token after token 2"):
        SamplingParams(logit_mask=mask.T)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature=-1: give 0"),
        ({"top_p": 0}, "top_p=0: give a probability above 0 and up to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: give 1 or more"),
        ({"stop": ("a", "")}, "stop contains an empty string"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is above max_new_tokens=8: lower the first"),
        (
            {"generation_config": GenerationConfig(top_k=3)},
            r"generation_config.top_k=3 but SamplingParams.top_k=0: use",
        ),
    ],
)
def test_bad_parameters(options, words):
    with pytest.raises(ConfigError, match=words):
        SamplingParams(**options)


# ---- stopping ----


def ids_of(text, tokenizer):
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_completion_ends_once_it_is_long_enough(tokenizer):
    stopper = Stopper(SamplingParams(min_new_tokens=2), [3], None)
    found = [stopper.reason(ids, 3) for ids in ([3], [5], [5, 3], [5, 5], [5, 5, 3], [5, 5, 5])]
    assert found == [None, None, "stop", None, "stop", "length"]
    late = Stopper(SamplingParams(min_new_tokens=4, stop=("a", "b")), [], tokenizer)
    assert [late.reason(ids_of(text, tokenizer), 9) for text in ("bxa", "bxxa", "bxxx", "axxbb")] == [
        None,
        "stop",
        None,
        "stop",
    ], "a string that stood there before is over, and another one ends the completion"


def test_a_stop_string_of_many_bytes():
    """Each is a token."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert Stopper(SamplingParams(stop="é" * 9), [], tokenizer).reason(ids_of("é" * 9, tokenizer), 99) == "stop"
