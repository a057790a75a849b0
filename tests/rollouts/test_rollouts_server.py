"""Samples from servers: `trl serve` in this process, and servers that do everything wrong."""

from __future__ import annotations

import copy
from dataclasses import replace
from threading import Event

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from tests.conftest import MODELS, make_tokenizer
from tests.serve.support import serve
from trl.data.layout import lay_out
from trl.errors import ConfigError, DataError, EngineError
from trl.models.gathering import gathered_parameters
from trl.models.score import score
from trl.models.value_heads.auto_models import with_value_head
from trl.rollouts.connection import completion_body
from trl.rollouts.dispatch import Retries
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.logprob_modes import tells_policy
from trl.rollouts.sampling import SamplingParams, ban, chosen_logprobs, penalize
from trl.rollouts.server import ServerEngine
from trl.rollouts.server_info import read_info
from trl.rollouts.weight_folders import WeightFolders
from trl.rollouts.weight_sync import needs_merged_weights
from trl.types import Completion, Example

PROMPTS = [Prompt(ids) for ids in ([7, 8, 9, 10], [20, 21], [33, 34, 35], [50])]
PARAMS = SamplingParams(max_new_tokens=6, seed=3)
QUICK = Retries(most=1, backoff=0.01)


def tiny(seed=0, **config):
    torch.manual_seed(seed)
    model = MODELS["llama"](max_position_embeddings=128, **config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def with_lora(model, seed=1, **options):
    torch.manual_seed(seed)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | options)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted.eval()


def ids(rollouts):
    return [[rollout.ids for rollout in group] for group in rollouts]


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def served():
    """A server whose weights are others than the trainer's until it is sent them."""
    with serve(tiny(seed=9)) as served:
        yield served


@pytest.fixture
def engine(served, tmp_path):
    engine = ServerEngine(served.url, sync_dir=tmp_path / "weights", retries=QUICK, timeout=60, start_timeout=5)
    yield engine
    engine.close()


def test_samples_are_those_of_the_engine_in_process(model, engine, served):
    engine.sync(model, 4)
    found = engine.generate(PROMPTS, PARAMS, 3)
    expected = LocalEngine(model, make_tokenizer(), progress=False).generate(PROMPTS, PARAMS, 3)
    assert ids(found) == ids(expected)
    examples = [
        Example(prompt.ids, tuple(Completion(r.ids) for r in group))
        for prompt, group in zip(PROMPTS, found, strict=True)
    ]
    with torch.no_grad():
        scored = score(model, lay_out(examples, "padded")).logprobs
    for row, rollout in zip(scored, (r for group in found for r in group), strict=True):
        assert rollout.logprobs == pytest.approx(row[: len(rollout)].tolist(), abs=1e-5)
        assert rollout.version == 4
    assert engine.take_metrics()["engine/sync_logp_difference"] < 1e-5


def test_every_step_is_sent_once_and_the_cache_forgotten(model, engine, served):
    engine.sync(model, 0)
    before = list(served.asked)
    engine.sync(model, 0)
    assert served.asked == before
    start = before.index("/pause")
    assert before[start : start + 5] == [
        "/pause",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]
    folder = engine.folder.folders.folder
    assert [each.name for each in folder.iterdir()] == ["0"]
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    engine.sync(model, 1)
    assert [each.name for each in folder.iterdir()] == ["1"]
    expected = LocalEngine(model, progress=False).generate(PROMPTS, PARAMS, 1)
    assert ids(engine.generate(PROMPTS, PARAMS, 1)) == ids(expected)
    engine.close()
    assert not folder.exists()


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_travel_alone_or_merged(model, merged, served, tmp_path):
    """Alone, the server's own weights stay; where the adapter is not one that servers take, they are replaced."""
    served.worker.base.load_state_dict(model.state_dict())
    policy = with_lora(model, **({"use_dora": True} if merged else {}))
    engine = ServerEngine(served.url, sync_dir=tmp_path, retries=QUICK)
    if merged:
        with pytest.warns(
            UserWarning, match="merged into the weights before they are sent to servers, since it is a DoRA"
        ):
            engine.sync(policy, 0)
    else:
        engine.sync(policy, 0)
        assert "/collective_rpc" not in served.asked
    expected = LocalEngine(policy, progress=False).generate(PROMPTS, PARAMS, 2)
    found = engine.generate(PROMPTS, PARAMS, 2)
    assert ids(found) == ids(expected)
    assert found[0][0].logprobs == pytest.approx(expected[0][0].logprobs, abs=1e-5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    engine.sync(policy, 1)
    expected = LocalEngine(policy, progress=False).generate(PROMPTS, PARAMS, 2)
    assert ids(engine.generate(PROMPTS, PARAMS, 2)) == ids(expected)
    engine.close()


def test_what_makes_an_adapter_travel_merged(model):
    own = read_info(server_info(), "tiny")
    assert needs_merged_weights(with_lora(model), [own]) is None
    for options, words in [
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": [5]}, "tokens of the embeddings"),
        ({"target_parameters": ["model.layers.0.mlp.up_proj.weight"]}, "target_parameters"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
    ]:
        assert words in needs_merged_weights(with_lora(model, **options), [own]), words
    assert needs_merged_weights(model, [own]) == "the model has no adapter"
    assert "IA3" in needs_merged_weights(get_peft_model(tiny(), IA3Config(task_type="CAUSAL_LM")), [own])
    two = with_lora(tiny())
    two.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])
    assert "several adapters" in needs_merged_weights(two, [own])
    below = with_lora(tiny())
    below.get_base_model().lm_head.weight.requires_grad_(True)
    assert "below the adapter" in needs_merged_weights(below, [own])
    assert "--max-lora-rank" in needs_merged_weights(with_lora(model), [replace(own, max_lora_rank=2)])
    assert "--enable-lora" in needs_merged_weights(with_lora(model), [replace(own, takes_adapters=False)])


@pytest.mark.parametrize("case", ["plain", "value head", "lora", "dora", "modules to save", "tied"])
def test_gathered_parameters_are_the_merged_checkpoint(model, case):
    """Against `peft`'s own merging; the model itself is unchanged by it."""
    expected, given = model, model
    if case == "value head":
        given = with_value_head(model)
    elif case == "tied":
        expected = given = tiny(tie_word_embeddings=True)
    elif case != "plain":
        options = {"lora": {}, "dora": {"use_dora": True}, "modules to save": {"modules_to_save": ["lm_head"]}}[case]
        given = with_lora(model, **options)
        expected = copy.deepcopy(given).merge_and_unload()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    found = {name: tensor.clone() for name, tensor in gathered_parameters(given)}
    wanted = expected.state_dict()
    if case == "tied":
        wanted.pop("lm_head.weight")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())


def test_two_servers_share_the_prompts(model, tmp_path):
    """The samples are the same whichever server gives them, and one that is stopped in the middle loses and doubles none."""
    with serve(tiny(seed=8)) as one, serve(tiny(seed=9)) as two:
        engine = ServerEngine([one.url, two.url], sync_dir=tmp_path, retries=Retries(3, 0.01), timeout=60)
        engine.sync(model, 0)
        first = engine.generate(PROMPTS, PARAMS, 2)
        assert one.asked.count("/v1/completions") + two.asked.count("/v1/completions") == 4  # two checks, two parts
        generate = two.worker.engine.generate

        def dies(*arguments):
            """Refuse connections, and drop those that there are, before there is an answer."""
            connections, dropped = [*two.server.server_state.connections], Event()

            def drop():
                for listening in two.server.servers:
                    listening.close()
                for connection in connections:
                    connection.transport.abort()
                dropped.set()

            connections[0].loop.call_soon_threadsafe(drop)
            assert dropped.wait(60)
            return generate(*arguments)

        two.worker.engine.generate = dies
        assert ids(engine.generate(PROMPTS, PARAMS, 2)) == ids(first)
        assert engine.take_metrics()["engine/retried_requests"] >= 1
        engine.sync(model, 1)
        assert [server.version for server in engine.servers] == ["1", None]
        assert ids(engine.generate(PROMPTS, PARAMS, 2)) == ids(first)
        engine.close()


# ---- log-probabilities ----

CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 10},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 4},
    {"temperature": 0.7, "top_k": 10},
    {"temperature": 0.7, "repetition_penalty": 1.3},
]


def processed(logits, params):
    """log-softmax after everything that the parameters do to logits [1,V] at a first position."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[:, :40] = True
    logits = penalize(logits, seen, params.repetition_penalty)
    if params.min_new_tokens:
        logits = ban(logits, torch.tensor([2]), torch.tensor([True]))
    logits = logits / (params.temperature or 1)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    above = probabilities.cumsum(-1) - probabilities
    kept = (above < params.top_p) & (probabilities >= params.min_p * probabilities[:, :1])
    if params.top_k:
        kept[:, params.top_k :] = False
    return logits.masked_fill(~kept.gather(1, order.argsort()), -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_table_of_modes(options):
    """Each row, from logits: a mode tells the policy's log-probabilities where it is said to, and is off by > 0.01 where not."""
    params = SamplingParams(**options, max_new_tokens=8)
    logits = torch.randn(1, 99, generator=torch.Generator().manual_seed(0)) * 2
    token = logits.argmax(-1)
    logits[0, 2] = logits.max() - 0.1  # the end-of-sequence token, so that banning it shows
    own = chosen_logprobs(logits, token, params.temperature)
    told = {
        "policy_logprobs": own,
        "raw_logprobs": logits.log_softmax(-1)[0, token],
        "processed_logprobs": processed(logits, params)[0, token],
        "raw_logits": logits[0, token],
        "processed_logits": processed(logits, params)[0, token] + 1,
    }
    for mode, value in told.items():
        off = (value - own).abs().item()
        assert off < 1e-5 if tells_policy(mode, params) else off > 0.01, (mode, off)
    assert not tells_policy("another", params)


def test_numbers_that_are_not_the_policys_are_computed_again(model, engine):
    engine.sync(model, 0)
    assert engine.exact_logprobs(SamplingParams(top_k=5))
    url = engine.servers[0].url
    engine.infos = {url: replace(engine.infos[url], logprobs_mode="processed_logprobs")}
    assert engine.exact_logprobs(SamplingParams(temperature=0.5))
    with pytest.warns(UserWarning, match="processed_logprobs, which are not the policy's"):
        assert not engine.exact_logprobs(SamplingParams(top_k=5))
    assert not engine.exact_logprobs(SamplingParams(top_k=5))  # said once


# ---- what goes wrong ----


def server_info(**model):
    about = {"dtype": "torch.float32", "max_model_len": 128, "logprobs_mode": "raw_logprobs"}
    about |= {"hf_config": {"vocab_size": 99}} | model
    return {"vllm_config": {"model_config": about, "lora_config": {"max_lora_rank": 16}}}


def test_no_server_at_the_start(model, tmp_path):
    engine = ServerEngine("http://127.0.0.1:9", sync_dir=tmp_path, start_timeout=0.1)
    with pytest.raises(EngineError, match=r"connection was refused(?s:.)*trl serve .* --port 9"):
        engine.sync(model, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vocab_size": 50}, "vocabulary has 50 tokens; the trainer's model has 99"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1; that of the trainer's model is 2"),
        ({"hidden_size": 64}, "hidden_size is 64; that of the trainer's model is 32"),
    ],
)
def test_a_server_that_does_not_fit(model, config, words, tmp_path):
    """An error before it is sent anything."""
    with serve(tiny(**config)) as served:
        engine = ServerEngine(served.url, sync_dir=tmp_path)
        with pytest.raises(EngineError, match=words):
            engine.sync(model, 0)
        assert "/pause" not in served.asked


def test_a_server_with_a_shorter_context(model, tmp_path):
    """Prompts fit, and completions end with its context; that is said once."""
    short = tiny(seed=9)
    short.config.max_position_embeddings = 12
    with serve(short) as served:
        engine = ServerEngine(served.url, sync_dir=tmp_path)
        with pytest.warns(UserWarning, match="takes 12 tokens of prompt and completion, the model 128"):
            engine.sync(model, 0)
        params = replace(PARAMS, max_new_tokens=50, ignore_eos=True)
        assert [len(rollout) for (rollout,) in engine.generate(PROMPTS[:2], params)] == [8, 10]
        engine.close()


def test_a_server_that_keeps_its_weights_is_found_out(model, engine, served):
    served.worker.reload = lambda folder: None
    with pytest.raises(EngineError, match=r"does not sample from the weights of the trainer: .* nats per token"):
        engine.sync(model, 0)


def test_a_server_that_cannot_read_the_folder(model, engine, served):
    (engine.sync_dir).mkdir()

    def elsewhere(folder):
        raise ConfigError(f"weights_path={folder!r}: there is no config.json in it.")

    served.worker.reload = elsewhere
    with pytest.raises(EngineError, match=r"no config.json in it.* Does the server see the folder"):
        engine.sync(model, 0)
    assert not served.worker.paused


def test_what_is_refused_before_anything_is_sent(model, engine):
    with pytest.raises(EngineError, match="call sync"):
        engine.generate(PROMPTS, PARAMS, 1)
    engine.sync(model, 0)
    with pytest.raises(DataError, match=r"prompts\[1\] has 128 tokens, but the context of the servers is 128"):
        engine.generate([PROMPTS[0], Prompt([5] * 128)], PARAMS, 1)
    with pytest.raises(DataError, match=r"prompts\[0\] has model inputs"):
        engine.generate([Prompt([5], {"pixel_values": 1})], PARAMS, 1)
    with pytest.raises(DataError, match=r"prompts\[0\] has max_new_tokens=0: give at least 1, or None"):
        engine.generate([Prompt([5], max_new_tokens=0)], PARAMS, 1)


def test_a_prompts_own_limit_is_a_limit_of_min_new_tokens_too(model, engine):
    engine.sync(model, 0)
    prompts = [replace(PROMPTS[0], max_new_tokens=2), PROMPTS[1]]
    found = engine.generate(prompts, replace(PARAMS, min_new_tokens=4), 1)
    assert len(found[0][0]) == 2
    assert len(found[1][0]) >= 4
    with pytest.raises(ConfigError, match="beta and logit_mask"):
        engine.generate(PROMPTS, SamplingParams(beta=1.0), 1)
    with pytest.raises(ConfigError, match="rollout_sync_dir"):
        ServerEngine("http://example.com:8000")
    with pytest.raises(ConfigError, match="not the URL"):
        ServerEngine("localhost:8000")
    with pytest.raises(ConfigError, match="none of them twice"):
        ServerEngine(["http://localhost:1", "http://localhost:1"])


def test_every_parameter_is_said():
    """So that neither vLLM's defaults nor the model's generation config has a say."""
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, stop=("x",), max_new_tokens=9, seed=1)
    body = completion_body([[1, 2]], params, 2, "m")
    assert {k: body[k] for k in ("temperature", "top_p", "top_k", "min_p", "seed", "n")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "seed": 1,
        "n": 2,
    }
    assert (body["max_tokens"], body["stop"], body["repetition_penalty"]) == (9, ["x"], 1.0)


def test_what_vllm_says_of_itself():
    """Configurations that JSON cannot hold come as text."""
    text = 'LlamaConfig {\n  "model_type": "llama",\n  "vocab_size": 99\n}\n'
    info = read_info(server_info(hf_config=text), "m")
    assert (info.vocabulary, info.context, info.dtype, info.max_lora_rank) == (99, 128, "float32", 16)
    nested = 'LlavaConfig {"text_config": {"hidden_size": 8, "vocab_size": 7}, "vision_config": {"hidden_size": 4}}'
    assert read_info(server_info(hf_config=nested), "m").sizes == {"hidden_size": 8}
    assert read_info(server_info(hf_config="Config"), "m").vocabulary is None
    assert info.takes_adapters
    assert not info.is_own
    none = {"vllm_config": {**server_info()["vllm_config"], "lora_config": None}}
    assert not read_info(none, "m").takes_adapters


def test_a_version_is_there_as_a_whole_or_not_at_all(tmp_path):
    (tmp_path / "trl-weights-other-1-abc").mkdir()
    folders = WeightFolders(tmp_path)
    seen = []

    def write(folder):
        folder.mkdir()
        seen.append(sorted(each.name for each in folders.folder.iterdir()))

    first = folders.publish("1", write)
    second = folders.publish("2", write)
    assert seen == [["1.partial"], ["1", "2.partial"]]

    def fails(folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(EngineError, match="No space left on device"):
        folders.publish("3", fails)
    assert sorted(each.name for each in folders.folder.iterdir()) == ["1", "2"]
    folders.keep_only(second)
    assert not first.exists()
    folders.close()
    assert [each.name for each in tmp_path.iterdir()] == ["trl-weights-other-1-abc"]
