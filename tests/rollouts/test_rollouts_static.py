"""Static buffers: the kernels against plain torch, and the engine's samples against `generate` and the reference way."""

import gc
import weakref

import pytest
import torch
from transformers import GenerationConfig

from trl.models.half_weights import linears_of, rounded
from trl.rollouts import local, loop
from trl.rollouts.decode_attention import TILE, Form, Tables, attend_by_gather, own_places, write_by_index
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine, autocast_dtype, fastest_way, unwrap
from trl.rollouts.paged_cache import PagedCache, Pages
from trl.rollouts.paged_decoder import bucket
from trl.rollouts.sampling import SamplingParams, draw

VOCABULARY = 99
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16 if DEVICE == "cuda" else 4  # tensor cores add up no fewer than 16 products
STOPS = tuple(range(60, 72))
ARCHITECTURES = ["gpt2", "llama", "qwen3", "gemma2", "gemma3", "opt", "cohere", "granite"]
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter cuts bfloat16 off


# ── attention ───────────────────────────────────────────────────────────────────────────────────────────────────


class Case:
    """Pools, queries and tables: prompts of `prefixes` tokens with so many rows each, which have written `own` tokens."""

    def __init__(self, prefixes, rows_each, *, heads=2, group=3, size=24, page=16, fill=2, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        owner = [p for p, count in enumerate(rows_each) for _ in range(count)]
        own = torch.randint(0, 2 * page + 3, (len(owner),), generator=generator).tolist()
        own[0] = 0
        prompt_pages = max(1, -(-max(prefixes) // page))
        own_pages, free = -(-(max(own) + 1) // page), iter(torch.randperm(999, generator=generator).tolist())
        held = [[next(free) for _ in range(prompt_pages)] for _ in prefixes]
        pages = [held[p] + [next(free) for _ in range(own_pages)] for p in owner]
        pages += [[999] * (prompt_pages + own_pages)] * fill
        members = [
            [row for row, p in enumerate(owner) if p == prompt and prefixes[p]] for prompt in range(len(prefixes))
        ]
        tiles = [m[i : i + TILE] for m in members for i in range(0, len(m), TILE)]
        tiles = [t + [-1] * (TILE - len(t)) for t in tiles]
        tiles += [[-1] * TILE] * (len(pages) - len(tiles))
        prefix = [prefixes[p] for p in owner] + [0] * fill
        span = max(a + b for a, b in zip(prefix, own + [0] * fill, strict=True)) + 1
        move = [torch.tensor(x, device=DEVICE) for x in (pages, prefix, own + [0] * fill, tiles)]
        self.tables = Tables(*move, prompt_pages, span)
        self.real = len(owner)

        def rand(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.keys, self.values = rand(1000, page, heads, size), rand(1000, page, heads, size)
        self.query = rand(len(pages), heads * group, size)
        self.key, self.value = rand(len(pages), heads, size), rand(len(pages), heads, size)


FORMS = [
    Form(0.2),
    Form(1.0, softcap=5.0),
    Form(0.2, window=9),
    Form(0.2, window=40, sinks=torch.linspace(-2, 2, 6, device=DEVICE)),
]


@pytest.mark.parametrize("form", FORMS, ids=["plain", "soft-cap", "window", "window and sinks"])
def test_kernels_attend_as_plain_torch(monkeypatch, form):
    kernels = pytest.importorskip("trl.rollouts.triton_decode")
    monkeypatch.setattr(kernels, "PROMPT_PARTS", 2)
    monkeypatch.setattr(kernels, "PROGRAMS", 48)
    case = Case([37, 0], [9, 1], fill=1)  # more rows of a prompt than a tile has, and a prompt of one token
    ours = kernels.attend_by_kernels(case.query, case.keys, case.values, case.tables, form)
    plain = attend_by_gather(case.query, case.keys, case.values, case.tables, form)
    torch.testing.assert_close(ours[: case.real], plain[: case.real], atol=2e-6, rtol=1e-5)


def test_kernels_attend_in_half_precision_and_odd_sizes():
    kernels = pytest.importorskip("trl.rollouts.triton_decode")
    case = Case([20], [3], heads=1, group=1, size=20, dtype=HALF)
    ours = kernels.attend_by_kernels(case.query, case.keys, case.values, case.tables, Form(0.3))
    plain = attend_by_gather(case.query, case.keys, case.values, case.tables, Form(0.3))
    assert ours.dtype == HALF
    torch.testing.assert_close(ours[: case.real], plain[: case.real], atol=4e-3, rtol=4e-3)


def test_kernels_write_as_plain_torch():
    kernels = pytest.importorskip("trl.rollouts.triton_decode")
    case = Case([5, 18], [2, 2])
    expected, ours = ([case.keys.clone(), case.values.clone()] for _ in range(2))
    write_by_index(*expected, case.key, case.value, case.tables)
    kernels.write_by_kernel(*ours, case.key, case.value, case.tables)
    assert not torch.equal(expected[0], case.keys)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a[:999], b[:999], rtol=0, atol=0)  # the last page is written by all that fill up


def test_attention_is_the_softmax_over_a_rows_own_keys():
    """Row by row, from its pages, with nothing of the code under test."""
    case = Case([37, 0, 16], [3, 1, 2])
    found = attend_by_gather(case.query, case.keys, case.values, case.tables, Form(0.2))
    flat = case.keys.flatten(0, 1), case.values.flatten(0, 1)
    for row in range(case.real):
        prefix, own = case.tables.prefix[row], case.tables.own[row]
        pages = case.tables.pages[row].tolist()
        prompt = [pages[t // 16] * 16 + t % 16 for t in range(prefix)]
        places = prompt + [pages[case.tables.prompt_pages + t // 16] * 16 + t % 16 for t in range(own + 1)]
        assert places[-1] == own_places(case.tables, 16)[row]
        key, value = (pool[places].repeat_interleave(3, 1) for pool in flat)
        weights = (torch.einsum("hd,thd->ht", case.query[row], key) * 0.2).softmax(-1)
        torch.testing.assert_close(found[row], torch.einsum("ht,thd->hd", weights, value))


def test_pages_are_given_out_once():
    pages = Pages(5)
    first = pages.take(3)
    pages.give_back(first[:2])
    assert sorted([*first[2:], *pages.take(4)]) == [0, 1, 2, 3, 4]


def test_buckets():
    assert [bucket(rows) for rows in (1, 8, 9, 16, 17, 64, 65)] == [8, 8, 16, 16, 32, 64, 128]


# ── the engine ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(local, "PAGE", PAGE)


@pytest.fixture
def make(make_model):
    def build(name, **config):
        model = make_model(name, **{"tie_word_embeddings": False} | config).to(DEVICE)
        model.generation_config.forced_eos_token_id = None
        return model

    return build


def ragged(lengths=(5, 1, 12, 9, 9, 3)):
    generator = torch.Generator().manual_seed(1)
    return [Prompt(torch.randint(6, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def flat(rollouts):
    return [rollout for samples in rollouts for rollout in samples]


def static(model, **options):
    return LocalEngine(model, static=True, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_generate_token_by_token(make, name):
    """Prompts of many lengths, two samples each, a few at a time, stopping at different times."""
    model, prompts = make(name), ragged()
    with torch.no_grad():
        assert fastest_way(unwrap(model), static=True) == "paged"
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=STOPS, ignore_eos=True)
    rollouts = static(model, max_tokens_alive=140).generate(prompts, params, 2)
    for prompt, samples in zip(prompts, rollouts, strict=True):
        ids = torch.tensor([prompt.ids], device=DEVICE)
        config = GenerationConfig(pad_token_id=0, eos_token_id=list(STOPS), do_sample=False, max_new_tokens=24)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for rollout in samples:
            assert list(rollout.ids) == out[0, len(prompt) :].tolist()
            assert rollout.finish_reason == ("stop" if rollout.ids[-1] in STOPS else "length")
    assert len({len(rollout) for rollout in flat(rollouts)}) > 1


OPTIONS = [
    {},
    {"temperature": 0.6, "top_k": 12},
    {"top_p": 0.8, "min_new_tokens": 5},
    {"min_p": 0.05, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_samples_are_those_of_the_reference_way(make, name, options):
    """Token for token, in buckets of 8, 16 and 32 rows; log-probabilities too, which other tests hold against `score`."""
    model, prompts = make(name), ragged()
    params = SamplingParams(max_new_tokens=16, stop_token_ids=STOPS, seed=11, **options)
    expected = flat(LocalEngine(model, static=False).generate(prompts, params, 4))
    for limit in (100, 300, 10_000):
        found = flat(static(model, max_tokens_alive=limit).generate(prompts, params, 4))
        assert [(r.ids, r.finish_reason) for r in found] == [(r.ids, r.finish_reason) for r in expected]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_do_not_depend_on_how_often_they_are_looked_at(make, monkeypatch, steps):
    model, prompts = make("llama"), ragged()
    params = SamplingParams(max_new_tokens=16, stop_token_ids=STOPS, seed=4)
    expected = static(model).generate(prompts, params, 2)
    monkeypatch.setattr(loop, "LOOK_EVERY", steps)
    assert [r.ids for r in flat(static(model).generate(prompts, params, 2))] == [r.ids for r in flat(expected)]


def test_what_is_drawn_after_the_end_leaves_no_trace_and_no_position_beyond_the_context(make):
    """GPT-2 has 16 positions; rows that end early are computed on until the next look."""
    model = make("gpt2", n_positions=16)
    prompts = [Prompt([7] * 5, max_new_tokens=2), Prompt([7] * 5), Prompt([8] * 12)]
    params = SamplingParams(temperature=0, max_new_tokens=11, ignore_eos=True)
    assert [len(r) for r in flat(static(model).generate(prompts, params, 1))] == [2, 11, 4]


def test_few_rows_are_not_computed_in_a_large_bucket(make, monkeypatch):
    """40 samples of which 39 end at the first token: the last is computed among 8 rows, not among 64."""
    monkeypatch.setattr(loop.Steps, "_capture", lambda self, rows: setattr(self, "captures", False))
    model, sizes = make("llama"), []
    prompts = [Prompt([7, 8], max_new_tokens=1)] * 39 + [Prompt([9, 8])]
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[0]))
    rollouts = flat(static(model).generate(prompts, SamplingParams(max_new_tokens=24, ignore_eos=True), 1))
    assert [len(r) for r in rollouts] == [1] * 39 + [24]
    assert sizes[-16:] == [8] * 16
    assert 64 in sizes


def test_kernels_that_fail_leave_samples_to_another_way(make, monkeypatch):
    """As Triton's do, by errors of its own, where a program needs more memory than a card has."""

    class OutOfResources(Exception): ...

    def fail(*_, **__):
        raise OutOfResources("out of resource: shared memory, Required: 106504, Hardware limit: 101376")

    monkeypatch.setattr(local, "paged_decoder", fail)
    model, params = make("llama"), SamplingParams(temperature=0, max_new_tokens=5)
    with pytest.warns(UserWarning, match="LlamaForCausalLM.*OutOfResources.*shared memory"):
        found = static(model).generate(ragged(), params, 1)
    assert flat(found) == flat(LocalEngine(model).generate(ragged(), params, 1))


def test_options_that_look_at_each_row_are_left_to_the_reference_way(make):
    model, prompts = make("llama"), ragged()
    config = GenerationConfig(no_repeat_ngram_size=2, do_sample=False, max_new_tokens=12)
    params = SamplingParams.from_generation_config(config, ignore_eos=True)
    assert flat(static(model).generate(prompts, params, 1)) == flat(LocalEngine(model).generate(prompts, params, 1))


def test_buffers_are_freed_when_the_round_ends(make, monkeypatch):
    made = []
    monkeypatch.setattr(
        PagedCache,
        "decode",
        lambda self, tables, plain=PagedCache.decode: (made.append(weakref.ref(self)), plain(self, tables)),
    )
    gc.disable()  # a backward pass that follows at once may need the memory
    try:
        static(make("llama")).generate(ragged(), SamplingParams(max_new_tokens=3, ignore_eos=True), 2)
        assert made
        assert all(reference() is None for reference in made)
    finally:
        gc.enable()


def test_top_p_sorted_at_once_draws_the_same_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 2_000, generator=generator) * 3
    u = torch.rand(50, generator=generator, dtype=torch.double)
    params = SamplingParams(top_p=0.7)
    assert torch.equal(draw(logits, params, u), draw(logits, params, u, may_sync=False))


# ── weights under autocast ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def under_autocast(make):
    """A float32 model whose forward runs in bfloat16, as accelerate wraps it."""
    model = make("llama")
    plain = model.forward

    def forward(*args, **kwargs):
        with torch.autocast(DEVICE, torch.bfloat16):
            return plain(*args, **kwargs)

    forward.__wrapped__ = plain
    model.forward = forward
    return model


def test_weights_are_cast_once_and_given_back(under_autocast):
    model, ids = under_autocast, torch.tensor([[5, 6, 7]], device=DEVICE)
    policy, before = unwrap(model), dict(model.named_parameters())
    with torch.no_grad():
        assert autocast_dtype(policy) == torch.bfloat16
        expected = model(input_ids=ids).logits
        with rounded(linears_of(model), torch.bfloat16):
            assert model.lm_head.weight.dtype == model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
            assert model.model.norm.weight.dtype == torch.float32
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert dict(model.named_parameters()) == before
    assert all(a is b for a, b in zip(before.values(), model.parameters(), strict=True))


def test_sampling_under_autocast_reads_rounded_weights(under_autocast):
    model, dtypes = under_autocast, set()
    model.lm_head.register_forward_hook(lambda module, args, out: dtypes.add(module.weight.dtype))
    engine = static(model)
    (rollout,) = flat(engine.generate([Prompt([5, 6, 7])], SamplingParams(max_new_tokens=9, ignore_eos=True), 1))
    assert len(rollout) == 9
    assert torch.bfloat16 in dtypes
    assert model.lm_head.weight.dtype == torch.float32
    assert autocast_dtype(unwrap(model)) == torch.bfloat16
