"""The built-in engine against `model.generate` and plain forwards, over architectures, limits and ways to stop."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationConfig, GPT2Config, GPT2ForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.errors import ConfigError, DataError, ModelError
from trl.models.checkpointing import checkpoint_activations
from trl.models.score import score
from trl.rollouts.decoders import Sample, batches_by_length, fill_holes
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine, check_device, fastest_way, unwrap
from trl.rollouts.repeated_decoder import RepeatedDecoder
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.shared_decoder import SharedDecoder
from trl.rollouts.stopping import Stopper
from trl.types import Completion, Example

VOCABULARY = 99
STOPS = tuple(range(60, 72))
SHARED = ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "cohere", "granite"]
REPEATED = ["bloom", "mamba", "t5", "bart"]


@pytest.fixture
def make(make_model):
    """Tiny models whose greedy completions wander: heads apart from the embeddings, no token forced at the end."""

    def build(name, **config):
        if name == "qwen2":
            model = scaled(Qwen2ForCausalLM(Qwen2Config(**QWEN2)))
        else:
            model = make_model(name, **{"tie_word_embeddings": False} | config)
        model.generation_config.forced_eos_token_id = None
        return model

    return build


QWEN2 = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def scaled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model.eval()


def ragged(seed=1, lengths=(5, 1, 12, 9, 9, 3)):
    generator = torch.Generator().manual_seed(seed)
    return [Prompt(torch.randint(6, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def by_generate(model, prompt, **options):
    ids = torch.tensor([prompt.ids])
    config = GenerationConfig(pad_token_id=0, eos_token_id=list(STOPS), **{"do_sample": False} | options)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


def forward_logprobs(model, prompt, ids, temperature=1.0):
    """One plain teacher-forced forward."""
    if model.config.is_encoder_decoder:
        start = model.generation_config.decoder_start_token_id
        logits = model(
            input_ids=torch.tensor([prompt.ids]), decoder_input_ids=torch.tensor([[start, *ids[:-1]]])
        ).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt.ids, *ids[:-1]]])).logits[0, len(prompt) - 1 :]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].detach()


def flat(rollouts):
    return [rollout for samples in rollouts for rollout in samples]


@pytest.mark.parametrize("name", SHARED + REPEATED)
def test_the_path_is_the_one_meant_for_the_architecture(make, name):
    with torch.no_grad():
        assert fastest_way(unwrap(make(name))) == ("shared" if name in SHARED else "repeated")


@pytest.mark.parametrize("name", SHARED + REPEATED)
def test_greedy_is_generate_token_by_token(make, name):
    model, prompts = make(name), ragged()
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=STOPS, ignore_eos=True)
    # a limit that lets a few samples in at a time: rows leave, others take their place
    rollouts = LocalEngine(model, max_tokens_alive=110).generate(prompts, params, 2)
    for prompt, samples in zip(prompts, rollouts, strict=True):
        expected = by_generate(model, prompt, max_new_tokens=24)
        for rollout in samples:
            assert list(rollout.ids) == expected
            assert rollout.finish_reason == ("stop" if expected[-1] in STOPS else "length")
    lengths = {len(rollout) for rollout in flat(rollouts)}
    assert len(lengths) > 1, "all completions are of one length: choose other stop tokens"


@pytest.mark.parametrize("name", SHARED + REPEATED)
def test_logprobs_are_those_of_a_plain_forward(make, name):
    model, prompts = make(name), ragged()
    params = SamplingParams(
        temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=20, stop_token_ids=STOPS, repetition_penalty=1.2, seed=3
    )
    rollouts = LocalEngine(model, max_tokens_alive=150).generate(prompts, params, 3)
    for prompt, samples in zip(prompts, rollouts, strict=True):
        for rollout in samples:
            expected = forward_logprobs(model, prompt, rollout.ids, 0.7)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=1e-4)
    assert len({rollout.ids for rollout in flat(rollouts)}) > len(prompts)


OPTIONS = [
    {"temperature": 0.6},
    {"top_k": 12, "top_p": 0.9},
    {"min_p": 0.05, "temperature": 1.3},
    {"repetition_penalty": 1.4, "top_p": 0.8},
]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2", "gemma3", "t5", "llama with an adapter"])
def test_logprobs_are_those_of_score(make, name):
    """Under the unmodified policy, whatever was done to the distribution that the tokens were drawn from."""
    model, prompts = make(name.split()[0]), ragged(lengths=(5, 1, 9))
    if name.endswith("adapter"):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    for options in OPTIONS:
        params = SamplingParams(max_new_tokens=8, stop_token_ids=STOPS, seed=5, **options)
        rollouts = LocalEngine(model, max_tokens_alive=40).generate(prompts, params, 2)
        pairs = zip(prompts, rollouts, strict=True)
        examples = [Example(p.ids, tuple(Completion(r.ids) for r in samples)) for p, samples in pairs]
        if name == "t5":
            batch = lay_out_encoder_decoder(examples, pad_token_id=0, decoder_start_token_id=0)
        else:
            batch = lay_out(examples)
        with torch.no_grad():
            expected = score(model, batch, temperature=options.get("temperature", 1.0)).logprobs
        found = torch.zeros_like(expected)
        for row, rollout in zip(found, flat(rollouts), strict=True):
            row[: len(rollout)] = torch.tensor(rollout.logprobs)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2", "gemma3", "bloom", "t5"])
def test_same_seed_same_samples_whatever_the_limit(make, name):
    model, prompts = make(name), ragged()
    params = SamplingParams(max_new_tokens=16, stop_token_ids=STOPS, seed=11)
    limits = [1, 3 * 28, 64 * 28]  # one, about three and all samples at a time
    one, three, all_ = (
        [r.ids for r in flat(LocalEngine(model, max_tokens_alive=limit).generate(prompts, params, 4))]
        for limit in limits
    )
    assert one == three == all_
    other = LocalEngine(model).generate(prompts, SamplingParams(max_new_tokens=16, stop_token_ids=STOPS, seed=12), 4)
    assert [r.ids for r in flat(other)] != one


def test_a_sample_does_not_depend_on_its_neighbours(make):
    model, prompts = make("llama"), ragged()
    params = SamplingParams(max_new_tokens=16, stop_token_ids=STOPS, seed=11)
    engine = LocalEngine(model)
    many, few = engine.generate(prompts, params, 4), engine.generate(prompts[:2], params, 2)
    assert [[r.ids for r in samples[:2]] for samples in many[:2]] == [[r.ids for r in samples] for samples in few]


@pytest.mark.parametrize("limit", [60, 10_000])
def test_a_prompt_is_read_once_and_finished_rows_no_more(make, limit):
    """Tokens that the model reads: each prompt's all but last, and one per sampled token. Not one more."""
    model, prompts = make("llama"), ragged(lengths=(9, 9, 9))
    params = SamplingParams(max_new_tokens=12, stop_token_ids=STOPS, seed=0)
    engine, read = LocalEngine(model, max_tokens_alive=limit), []
    engine.generate(prompts, params, 1)  # the first call tries the model out
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    rollouts = flat(engine.generate(prompts, params, 4))
    assert len({len(rollout) for rollout in rollouts}) > 2
    assert sum(read) == 3 * 8 + sum(map(len, rollouts))


def test_without_a_seed_torchs_state_decides(make):
    model, prompts, params = make("llama"), ragged(), SamplingParams(max_new_tokens=8)
    engine = LocalEngine(model)
    torch.manual_seed(5)
    first, second = engine.generate(prompts, params, 2), engine.generate(prompts, params, 2)
    torch.manual_seed(5)
    assert engine.generate(prompts, params, 2) == first != second


def test_samples_follow_the_policy(make):
    """First tokens of 4,000 samples against the model's distribution, by chi-square."""
    model, prompt = make("llama"), ragged()[0]
    probabilities = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double().div(2).softmax(-1).detach()
    params = SamplingParams(temperature=2.0, max_new_tokens=1, seed=0)
    (samples,) = LocalEngine(model, max_tokens_alive=1000).generate([prompt], params, 4000)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in samples]), minlength=VOCABULARY).double()
    common = probabilities * 4000 >= 5
    freedom, expected = int(common.sum()), 4000 * probabilities
    assert freedom > 20
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_min_new_tokens_keeps_stop_tokens_away(make):
    model, prompts = make("llama"), ragged()
    params = SamplingParams(temperature=0, max_new_tokens=16, min_new_tokens=10, stop_token_ids=STOPS, ignore_eos=True)
    for prompt, (rollout,) in zip(prompts, LocalEngine(model).generate(prompts, params, 1), strict=True):
        assert list(rollout.ids) == by_generate(model, prompt, max_new_tokens=16, min_new_tokens=10)
        assert not set(rollout.ids[:10]) & set(STOPS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_repetition_penalty_is_that_of_generate(make, name):
    model, prompts = make(name), ragged()
    params = SamplingParams(
        temperature=0, max_new_tokens=16, repetition_penalty=1.6, stop_token_ids=STOPS, ignore_eos=True
    )
    for prompt, (rollout,) in zip(
        prompts, LocalEngine(model, max_tokens_alive=60).generate(prompts, params, 1), strict=True
    ):
        assert list(rollout.ids) == by_generate(model, prompt, max_new_tokens=16, repetition_penalty=1.6)


def test_a_stop_string_over_token_boundaries_ends_the_completion(make, tokenizer):
    """The completion that greedy decoding gives is cut where a string of three of its tokens first ends."""
    model, prompt = make("llama"), ragged()[2]
    free = SamplingParams(temperature=0, max_new_tokens=16, ignore_eos=True)
    engine = LocalEngine(model, tokenizer)
    ((whole,),) = engine.generate([prompt], free, 1)
    string = tokenizer.decode(whole.ids[4:7])
    end = next(k for k in range(1, 17) if string in tokenizer.decode(whole.ids[:k]))
    ((cut,),) = engine.generate(
        [prompt], SamplingParams(temperature=0, max_new_tokens=16, ignore_eos=True, stop=string), 1
    )
    assert (cut.ids, cut.finish_reason) == (whole.ids[:end], "stop")
    late = SamplingParams(temperature=0, max_new_tokens=16, min_new_tokens=16, ignore_eos=True, stop=string)
    ((kept,),) = engine.generate([prompt], late, 1)
    assert kept.ids == whole.ids


def test_a_stop_string_before_the_least_length_is_past(tokenizer):
    params = SamplingParams(stop=("ab",), min_new_tokens=4)
    stopper, ids = Stopper(params, [], tokenizer), tokenizer.encode("abxxab", add_special_tokens=False)
    assert [stopper.reason(ids[:length], 9) for length in range(1, 7)] == [None] * 5 + ["stop"]


def test_copies_of_a_cache_count_each(make):
    """Three samples of a prompt of 5 tokens, 2 new ones each: 21 tokens in three caches, 11 with one copy of the prompt."""
    rows = [Sample(0, number, Prompt([6] * 5), 2) for number in range(3)]
    for name, each in {"bloom": [7, 7, 7], "llama": [7, 2, 2]}.items():
        policy = unwrap(make(name))
        decoder = RepeatedDecoder(policy) if name == "bloom" else SharedDecoder(policy, [None, None], 3)
        assert [decoder.cost(row, after=rows[:i]) for i, row in enumerate(rows)] == each


def test_logits_that_are_not_finite(make):
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(ModelError, match=r"logits after prompts\[0\] and 0 sampled tokens are not finite"):
        LocalEngine(model).generate([Prompt([5, 6])], SamplingParams(max_new_tokens=3))


def test_max_length_of_a_generation_config_counts_the_prompt(make):
    params = SamplingParams.from_generation_config(GenerationConfig(max_length=12), ignore_eos=True)
    assert [len(r) for r in flat(LocalEngine(make("llama")).generate(ragged(lengths=(5, 1, 9)), params, 1))] == [
        7,
        11,
        3,
    ]


def test_limits_of_a_prompt_and_of_the_context(make):
    model = make("gpt2", n_positions=16)
    prompts = [Prompt([7] * 5, max_new_tokens=2), Prompt([7] * 5), Prompt([8] * 12)]
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    assert [len(r) for r in flat(LocalEngine(model).generate(prompts, params, 1))] == [2, 6, 4]


def test_adapters_are_sampled_from_and_can_be_switched_off(make):
    base = make("llama")
    prompts, params = ragged(), SamplingParams(temperature=0, max_new_tokens=12, stop_token_ids=STOPS, ignore_eos=True)
    plain = LocalEngine(base).generate(prompts, params, 1)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    engine = LocalEngine(model)
    adapted = engine.generate(prompts, params, 1)
    assert adapted != plain
    for prompt, (rollout,) in zip(prompts, adapted, strict=True):
        assert list(rollout.ids) == by_generate(model, prompt, max_new_tokens=12)
    with model.disable_adapter():
        assert [r.ids for r in flat(engine.generate(prompts, params, 1))] == [r.ids for r in flat(plain)]


def test_a_data_parallel_policy_is_sampled_from_its_module(make):
    model, prompts, params = make("llama"), ragged(), SamplingParams(temperature=0, max_new_tokens=6)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = LocalEngine(DistributedDataParallel(model)).generate(prompts, params, 2)
    finally:
        dist.destroy_process_group()
    assert parallel == LocalEngine(model).generate(prompts, params, 2)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_policy_in_half_precision_keeps_one_copy_of_the_prompt(make, name):
    model, prompts = make(name).to(torch.bfloat16), ragged()
    with torch.no_grad():
        assert fastest_way(unwrap(model)) == "shared"
    rollouts = LocalEngine(model).generate(prompts, SamplingParams(max_new_tokens=12, seed=3), 2)
    for prompt, samples in zip(prompts, rollouts, strict=True):
        for rollout in samples:
            expected = forward_logprobs(model.float(), prompt, rollout.ids)
            difference = torch.tensor(rollout.logprobs) - expected
            assert difference.abs().mean() < 0.1  # rounding of bfloat16 to three digits


def test_new_weights_give_new_samples_and_sync_another_model(make):
    model, other = make("llama"), make("llama", seed=1)
    prompts, params = ragged(), SamplingParams(temperature=0, max_new_tokens=8)
    engine = LocalEngine(model)
    before = engine.generate(prompts, params, 1)
    engine.sync(other, step=1)
    after = engine.generate(prompts, params, 1)
    assert after != before
    model.load_state_dict(other.state_dict())
    engine.sync(model, step=2)
    assert [r.ids for r in flat(engine.generate(prompts, params, 1))] == [r.ids for r in flat(after)]


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_the_model_is_left_as_it_was(make, name):
    dropout = {"gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5}, "bart": {"attention_dropout": 0.5}}[name]
    model, prompts = make(name, **dropout).train(), ragged()
    checkpoint_activations(model)
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)).eval()
    implementation = model.config._attn_implementation
    params = SamplingParams(temperature=0, max_new_tokens=6)
    first = LocalEngine(model).generate(prompts, params, 1)
    assert first == LocalEngine(model).generate(prompts, params, 1)
    assert model.training
    assert not frozen.training
    assert model.config._attn_implementation == implementation
    loss = model(input_ids=torch.tensor([prompts[0].ids]), labels=torch.tensor([prompts[0].ids])).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_other_options_of_a_generation_config_are_those_of_generate(make):
    model, prompts = make("llama"), ragged()
    options = {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(20, 50)), "max_new_tokens": 12}
    config = GenerationConfig(do_sample=False, eos_token_id=list(STOPS), **options)
    params = SamplingParams.from_generation_config(config)
    for prompt, (rollout,) in zip(
        prompts, LocalEngine(model, max_tokens_alive=60).generate(prompts, params, 1), strict=True
    ):
        assert list(rollout.ids) == by_generate(model, prompt, **options)
        expected = forward_logprobs(model, prompt, rollout.ids)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_an_option_that_only_samples_is_run_by_transformers(make):
    """Typical sampling with a tiny mass leaves one token, so that the draw is known."""
    model, prompt = make("llama"), ragged()[2]
    config = GenerationConfig(do_sample=True, typical_p=1e-6, max_new_tokens=8, eos_token_id=list(STOPS))
    ((first, second),) = LocalEngine(model).generate([prompt], SamplingParams.from_generation_config(config), 2)
    expected = by_generate(model, prompt, do_sample=True, top_k=0, typical_p=1e-6, max_new_tokens=8)
    assert list(first.ids) == list(second.ids) == expected


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beam_search_is_left_to_generate_said_once(make, name):
    model, prompts = make(name), ragged()
    config = GenerationConfig(num_beams=3, max_new_tokens=8, eos_token_id=list(STOPS))
    engine, params = LocalEngine(model), SamplingParams.from_generation_config(config)
    with pytest.warns(
        UserWarning, match=r"does not support num_beams of the generation config: model.generate"
    ) as said:
        rollouts = engine.generate(prompts, params, 2)
    assert len(said) == 1
    engine.generate(prompts[:1], params, 1)  # a second warning would be an error
    for prompt, samples in zip(prompts, rollouts, strict=True):
        best = by_generate(model, prompt, num_beams=3, max_new_tokens=8)
        while best[-1] == 0:
            best.pop()
        assert list(samples[0].ids) == best
        for rollout in samples:
            expected = forward_logprobs(model, prompt, rollout.ids)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-3, rtol=1e-3)


def test_a_model_on_several_devices_is_left_to_generate(make):
    """As `device_map="auto"` places it on a machine with several: tables and caches of the engine are on one."""
    model, prompt = make("llama"), ragged()[2]
    model.lm_head.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(1, device="meta")))
    with pytest.warns(UserWarning, match=r"on several devices: model.generate"):
        ((rollout,),) = LocalEngine(model).generate([prompt], SamplingParams(temperature=0, max_new_tokens=4), 1)
    assert list(rollout.ids) == by_generate(model, prompt, max_new_tokens=4)


@pytest.mark.filterwarnings("ignore:The engine does not support num_beams")
def test_sampling_by_generate_leaves_the_other_gpus_of_the_machine_alone(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = GenerationConfig(num_beams=2, max_new_tokens=2)
    ((sample,),) = LocalEngine(make("llama")).generate(ragged()[:1], SamplingParams.from_generation_config(config))
    assert len(sample.ids) <= 2


def test_an_encoder_decoder_is_given_tokens_alone(make):
    prompt = Prompt([5, 6], {"pixel_values": torch.zeros(1, 3)})
    with pytest.raises(DataError, match=r"prompts\[1\] has inputs \['pixel_values'\]"):
        LocalEngine(make("t5")).generate([Prompt([5]), prompt], SamplingParams(max_new_tokens=2), 1)


def test_rows_that_leave_are_replaced_by_the_last():
    assert fill_holes([True, False, True, False, True, True]) == [0, 4, 2, 5]
    assert fill_holes([False, False]) == []
    assert fill_holes([True, True]) == [0, 1]


def test_prompts_are_prefilled_with_their_like():
    assert list(batches_by_length({0: 10, 1: 100, 2: 80, 3: 9, 4: 74})) == [[1, 2], [4], [0, 3]]
    assert [len(batch) for batch in batches_by_length(dict.fromkeys(range(5), 8192))] == [2, 2, 1]


@pytest.mark.parametrize(
    ("prompts", "params", "n", "error", "words"),
    [
        ([Prompt([5])], {}, 0, ConfigError, "n=0 is the number of samples per prompt: give at least 1"),
        ([Prompt([5]), Prompt([])], {}, 1, DataError, r"prompts\[1\] is empty: give at least one token"),
        (
            [Prompt([5], max_new_tokens=0)],
            {},
            1,
            DataError,
            r"prompts\[0\] has max_new_tokens=0: give at least 1, or None",
        ),
        ([Prompt([5] * 300)], {}, 1, DataError, r"prompts\[0\] has 300 tokens, the model's context is 256: shorten"),
        ([Prompt([5])], {"stop": "x"}, 1, ConfigError, r"stop=\('x',\) needs a tokenizer: pass one to the engine"),
    ],
)
def test_bad_input(make, prompts, params, n, error, words):
    with pytest.raises(error, match=words):
        LocalEngine(make("gpt2")).generate(prompts, SamplingParams(**params), n)


def test_devices_without_float64_are_refused():
    check_device(torch.device("cuda"))
    with pytest.raises(ConfigError, match="mps"):
        check_device(torch.device("mps"))


def test_a_model_that_does_not_generate():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9}
    with pytest.raises(ModelError, match="GPT2ForSequenceClassification cannot be sampled from: give a transformers"):
        LocalEngine(GPT2ForSequenceClassification(GPT2Config(**sizes))).generate([Prompt([5])], SamplingParams(), 1)
