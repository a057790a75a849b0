"""`trl serve`: what its routes answer, to whom, and within which limits."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model

from tests.conftest import MODELS, make_tokenizer
from tests.serve.support import serve
from trl.cli.chat.arguments import Generation
from trl.cli.chat.server import ServerSpeaker
from trl.cli.serve.arguments import ServeArguments
from trl.cli.serve.bodies import sampling_params
from trl.errors import ConfigError
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams

PROMPTS = [[7, 8, 9, 10], [20, 21]]
OPTIONS = {"return_token_ids": True, "logprobs": 0, "max_tokens": 6}


def tiny(seed=0, **config):
    torch.manual_seed(seed)
    model = MODELS["llama"](**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny(max_position_embeddings=128)


@pytest.fixture(scope="module")
def served(model):
    with serve(copy.deepcopy(model)) as served:
        yield served


def post(served, path, body=None, status=200, **keywords):
    answer = requests.post(served.url + path, json=body, timeout=60, **keywords)
    assert answer.status_code == status, answer.text
    return answer.json() if answer.headers["content-type"].startswith("application/json") else answer.text


def local(model, prompts, n=1, **params):
    engine = LocalEngine(model, make_tokenizer(), progress=False)
    return engine.generate([Prompt(ids) for ids in prompts], SamplingParams(max_new_tokens=6, **params), n)


def test_completions_are_those_of_the_engine_in_process(model, served):
    """Same seed, same tokens and log-probabilities, several prompts and samples in one request."""
    answer = post(served, "/v1/completions", {"prompt": PROMPTS, "n": 3, "seed": 5, "temperature": 0.7, **OPTIONS})
    expected = [rollout for group in local(model, PROMPTS, 3, seed=5, temperature=0.7) for rollout in group]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice, rollout in zip(answer["choices"], expected, strict=True):
        assert tuple(choice["token_ids"]) == rollout.ids
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(rollout.logprobs, abs=1e-6)
        assert choice["finish_reason"] == rollout.finish_reason
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert answer["usage"]["prompt_tokens"] == 6


def test_generate_takes_and_gives_tokens(model, served):
    params = {"temperature": 0, "max_tokens": 6}
    answer = post(served, "/inference/v1/generate", {"token_ids": PROMPTS[0], "sampling_params": params})
    (rollout,) = local(model, PROMPTS[:1], temperature=0.0)[0]
    (choice,) = answer["choices"]
    assert tuple(choice["token_ids"]) == rollout.ids
    assert [each["logprob"] for each in choice["logprobs"]["content"]] == pytest.approx(rollout.logprobs, abs=1e-6)
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": len(rollout)}]


def test_a_stop_string_ends_the_text_before_it(model, served):
    tokenizer = make_tokenizer()
    (rollout,) = local(model, PROMPTS[:1], temperature=0.0, ignore_eos=True)[0]
    stop = tokenizer.decode(rollout.ids[2:4])
    body = {"prompt": PROMPTS[0], "temperature": 0, "ignore_eos": True, "stop": stop, **OPTIONS}
    (choice,) = post(served, "/v1/completions", body)["choices"]
    end = tokenizer.decode(choice["token_ids"])
    assert end.endswith(stop)
    assert choice["text"] == end.removesuffix(stop)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_a_chat_streams_what_it_would_answer_at_once(served):
    """`trl chat --server` is the client; greedy answers are the same whether they are streamed or not."""
    messages = [{"role": "user", "content": "Say a"}]
    speaker, pieces = ServerSpeaker(served.url), []
    tokens = speaker.answer(messages, Generation(temperature=0, max_new_tokens=12), pieces.append)
    body = {"messages": messages, "temperature": 0, "max_completion_tokens": 12}
    answer = post(served, "/v1/chat/completions", body)
    assert speaker.name == "tiny"
    assert "".join(pieces) == answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == tokens


def test_requests_without_seeds_are_sampled_together(model):
    """While the model is paused eight clients ask; one call of the engine serves them."""
    with serve(copy.deepcopy(model)) as served:
        calls, engine = [], served.worker.engine
        generate = engine.generate
        engine.generate = lambda prompts, params, n: calls.append(len(prompts)) or generate(prompts, params, n)
        post(served, "/pause?mode=keep")
        body = {"prompt": PROMPTS[0], "temperature": 0, **OPTIONS}
        found = []
        clients = [
            threading.Thread(target=lambda: found.append(post(served, "/v1/completions", body))) for _ in range(8)
        ]
        for client in clients:
            client.start()
        while len(served.worker._jobs) < 8:
            time.sleep(0.01)
        assert requests.get(f"{served.url}/is_paused", timeout=60).json() == {"is_paused": True}
        post(served, "/resume")
        for client in clients:
            client.join()
    assert calls == [8]
    assert len({tuple(answer["choices"][0]["token_ids"]) for answer in found}) == 1


def test_pausing_by_abort_ends_what_waits(model):
    with serve(copy.deepcopy(model)) as served:
        post(served, "/pause?mode=keep")
        found = []
        body = {"prompt": PROMPTS[0], "n": 2, **OPTIONS}
        client = threading.Thread(target=lambda: found.append(post(served, "/v1/completions", body)))
        client.start()
        while not served.worker._jobs:
            time.sleep(0.01)
        post(served, "/pause?mode=abort")
        client.join()
    assert [(c["finish_reason"], c["token_ids"]) for c in found[0]["choices"]] == [("abort", [])] * 2


def test_weights_are_reloaded_from_a_folder(model, tmp_path):
    other = tiny(seed=1, max_position_embeddings=128)
    other.save_pretrained(tmp_path / "other")
    tiny(vocab_size=50).save_pretrained(tmp_path / "smaller")
    body = {"prompt": PROMPTS, "temperature": 0, **OPTIONS}
    with serve(copy.deepcopy(model)) as served:
        before = post(served, "/v1/completions", body)

        def reload(folder, status=200):
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder), "is_checkpoint_format": True}}
            return post(served, "/collective_rpc", body, status)

        assert "no config.json" in reload(tmp_path / "nowhere", 400)["error"]["message"]
        assert "does not fit the model" in reload(tmp_path / "smaller", 400)["error"]["message"]
        assert post(served, "/v1/completions", body)["choices"] == before["choices"]
        assert reload(tmp_path / "other") == {"results": [None]}
        assert post(served, "/update_weight_version", {"new_version": "7"}) == {"success": True}
        assert requests.get(f"{served.url}/weight_info", timeout=60).json() == {"weight_version": "7"}
        assert post(served, "/reset_prefix_cache") == {"success": True}
        after = post(served, "/v1/completions", body)
    expected = [group[0] for group in local(other, PROMPTS, temperature=0.0)]
    for choice, rollout in zip(after["choices"], expected, strict=True):
        assert tuple(choice["token_ids"]) == rollout.ids
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(rollout.logprobs, abs=1e-6)


def test_adapters_are_models_of_their_own(model, tmp_path):
    """An adapter in place of one of its name answers at once; the model itself is as it was, and can be reloaded below it."""
    expected = {}
    for name in ("first", "second"):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(len(name))
        for parameter in (p for n, p in adapted.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / name)
        expected[name] = [r.ids for (r,) in local(adapted.eval(), PROMPTS, temperature=0.0)]
    body = {"prompt": PROMPTS, "temperature": 0, **OPTIONS}

    def ids(served, name):
        return [tuple(c["token_ids"]) for c in post(served, "/v1/completions", {**body, "model": name})["choices"]]

    with serve(copy.deepcopy(model)) as served:
        plain = ids(served, "tiny")

        def load(folder, status=200, **more):
            return post(
                served, "/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": str(folder), **more}, status
            )

        assert "no adapter_config.json" in load(tmp_path, 400)["error"]["message"]
        assert "Success" in load(tmp_path / "first")
        assert ids(served, "mine") == expected["first"] != plain
        assert "already loaded" in load(tmp_path / "second", 400)["error"]["message"]
        load(tmp_path / "second", load_inplace=True)
        assert ids(served, "mine") == expected["second"] != expected["first"]
        model.save_pretrained(tmp_path / "base")
        post(
            served, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "base")}}
        )
        assert ids(served, "mine") == expected["second"]
        assert ids(served, "tiny") == plain
        names = [each["id"] for each in requests.get(f"{served.url}/v1/models", timeout=60).json()["data"]]
        assert names == ["tiny", "mine"]
        assert requests.get(f"{served.url}/v1/models/mine", timeout=60).json()["parent"] == "tiny"
        assert requests.get(f"{served.url}/v1/models/his", timeout=60).status_code == 404
        post(served, "/v1/unload_lora_adapter", {"lora_name": "mine"})
        assert "not served here" in post(served, "/v1/completions", {**body, "model": "mine"}, 404)["error"]["message"]
        assert ids(served, "tiny") == plain


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"prompt": [5], "presence_penalty": 0.5}, 400, "presence_penalty=0.5"),
        ("/v1/completions", {"prompt": [5], "temprature": 0.5}, 400, "'temprature' was unexpected"),
        ("/v1/completions", {"prompt": [5], "top_p": 7}, 400, "top_p=7"),
        ("/v1/completions", {"prompt": [5], "n": "many"}, 400, "n: 'many'"),
        ("/v1/completions", {"prompt": [5] * 128}, 400, "context length is 128"),
        ("/v1/completions", {"prompt": [99]}, 400, "token 99"),
        ("/v1/completions", {"prompt": [5], "n": 10**6}, 400, "max_request_tokens"),
        ("/v1/completions", {"prompt": [5], "model": "other"}, 404, "'other' is not served here"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "image_url",
        ),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/collective_rpc", {"method": "exec"}, 400, "'exec'"),
        ("/v1/responses", {"input": "a"}, 404, "POST /v1/responses is not available"),
        ("/health", {}, 405, "POST /health is not available"),
    ],
)
def test_requests_are_refused_by_name(served, path, body, status, words):
    assert words in post(served, path, body, status)["error"]["message"]


def test_the_context_is_the_models(model):
    with serve(copy.deepcopy(model), make_tokenizer(model_max_length=10)) as served:
        info = requests.get(f"{served.url}/server_info", timeout=60).json()
        assert info["vllm_config"]["model_config"]["max_model_len"] == 128
        (choice,) = post(served, "/v1/completions", {"prompt": [5] * 12, "ignore_eos": True, **OPTIONS})["choices"]
        assert len(choice["token_ids"]) == 6


def test_a_key_is_asked_for(model):
    with serve(copy.deepcopy(model), api_key="right") as served:
        assert requests.get(f"{served.url}/health", timeout=60).status_code == 200
        assert "needs an API key" in post(served, "/v1/completions", {"prompt": [5]}, 401)["error"]["message"]
        post(served, "/pause", status=401, headers={"Authorization": "Bearer wrong"})
        post(served, "/v1/completions", {"prompt": [5]}, headers={"Authorization": "Bearer right"})


def test_what_changes_the_model_is_for_this_machine_or_the_key(model):
    """A page of another origin is refused on any server; on one that is open and has no key, everybody is."""
    with serve(copy.deepcopy(model)) as served:
        post(served, "/pause", status=403, headers={"Origin": "http://example.com"})
        assert requests.get(f"{served.url}/v1/models", headers={"Host": "example.com"}, timeout=60).status_code == 400
    with serve(copy.deepcopy(model), host="0.0.0.0") as served:
        post(served, "/v1/completions", {"prompt": [5]})
        assert "--api_key" in post(served, "/collective_rpc", {"method": "x"}, 403)["error"]["message"]


def test_limits_of_size_and_time(model):
    with serve(copy.deepcopy(model), max_request_megabytes=0.001, request_timeout=0.5) as served:
        post(served, "/v1/completions", {"prompt": [5] * 2000}, 413)
        post(served, "/pause?mode=keep")
        assert "request_timeout=0.5" in post(served, "/v1/completions", {"prompt": [5]}, 504)["error"]["message"]
        served.worker.max_waiting = len(served.worker._jobs)
        assert "try again later" in post(served, "/v1/completions", {"prompt": [5]}, 503)["error"]["message"]
    with pytest.raises(ConfigError, match="request_timeout=0"):
        ServeArguments(request_timeout=0)


def test_parameters_of_vllm_have_their_meaning():
    params = sampling_params({"top_k": -1, "min_tokens": 2, "max_tokens": 9, "stop": ["a"]}, max_tokens=16)
    assert params == SamplingParams(top_k=0, min_new_tokens=2, max_new_tokens=9, stop=("a",))
