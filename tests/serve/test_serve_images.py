"""Images through `trl serve`: what is sampled there is what is sampled in process, and bad images are refused in words."""

from __future__ import annotations

import base64
import copy
from dataclasses import replace
from io import BytesIO

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from tests.conftest import MODELS
from tests.serve.images import asked
from tests.serve.support import serve
from tests.vision.support import FAMILIES, llava, picture, qwen2_5_vl
from tests.vision.test_vision_layouts import plain_logprobs
from tests.vision.test_vision_training import history, rows, trainer_of
from trl.cli.chat.arguments import Generation
from trl.cli.chat.server import ServerSpeaker
from trl.errors import DataError, EngineError
from trl.rollouts.connection import SentPrompt, Server
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.server import ServerEngine
from trl.rollouts.server_info import ServerInfo
from trl.rollouts.weight_sync import needs_merged_weights
from trl.types import Completion
from trl.vision.images import data_url
from trl.vision.places import collapsed_ids, expanded_ids
from trl.vision.processing import ImageProcessing

GREEDY = SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True, seed=1)
URL = data_url(picture(1))


def with_other_weights(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    return other


@pytest.mark.parametrize("name", FAMILIES)
def test_places_and_tokens_of_images_are_each_others_inverse(name):
    """For ids that are those of their text, and for others, which go token by token."""
    tiny = FAMILIES[name]()
    processing, words = ImageProcessing.of(tiny.processor, tiny.model.config), tiny.processor.tokenizer
    images = [picture(1), picture(2, 24, 40)]
    text = f"see {processing.place} and{processing.place}?"
    ids = words(text, add_special_tokens=False)["input_ids"]
    whole = words(processing.expand(text, images)[0], add_special_tokens=False)["input_ids"]
    assert expanded_ids(processing, ids, images) == whole
    assert collapsed_ids(processing, whole, images) == ids
    unknown = words.unk_token_id
    odd = [unknown, *ids]
    assert collapsed_ids(processing, expanded_ids(processing, odd, images), images) == odd
    with pytest.raises(DataError, match="1 images were given, but the tokens have 2 placeholders"):
        expanded_ids(processing, ids, images[:1])
    with pytest.raises(DataError, match="tokens of an image are not in its prompt"):
        collapsed_ids(processing, ids[:3], images)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_samples_after_images_are_those_in_process(name, tmp_path):
    """One, two and no images; the server has other weights until it is sent the trainer's."""
    tiny = FAMILIES[name]()
    examples, prompts = zip(
        asked(tiny, "*see this", [picture(1)]),
        asked(tiny, "a* b* c", [picture(2, 24, 40), picture(3)]),
        asked(tiny, "no image", []),
        strict=True,
    )
    expected = LocalEngine(tiny.model, progress=False).generate(prompts, GREEDY)
    with serve(with_other_weights(tiny.model), tiny.processor) as served:
        engine = ServerEngine(served.url, tiny.processor.tokenizer, sync_dir=tmp_path)
        engine.sync(tiny.model, 1)
        found = engine.generate(prompts, GREEDY)
        engine.close()
    assert [r.ids for (r,) in found] == [r.ids for (r,) in expected]
    for example, (rollout,) in zip(examples, found, strict=True):
        with torch.no_grad():
            logprobs = plain_logprobs(tiny, example, Completion(rollout.ids))
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, rtol=1e-5, atol=1e-5)


def test_grpo_through_a_server_is_grpo_in_process(tmp_path):
    """A prompt with two images at a time: same seeds, so the same samples, losses and gradients, step after step."""
    tiny, data = qwen2_5_vl(), rows("prompts").select([1])
    options = {"per_device_train_batch_size": 2}
    expected = history(trainer_of("grpo", tmp_path, copy.deepcopy(tiny), data, **options))
    with serve(with_other_weights(tiny.model), tiny.processor) as served:
        options |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": served.url}
        trainer = trainer_of("grpo", tmp_path, tiny, data, rollout_sync_dir=str(tmp_path), **options)
        found = history(trainer)
        trainer.engine.close()
    assert "/inference/v1/generate" in served.asked
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert any(found)


@pytest.fixture(scope="module")
def tiny():
    return llava()


@pytest.fixture(scope="module")
def served(tiny):
    with serve(copy.deepcopy(tiny.model), tiny.processor, max_request_pixels=10_000) as served:
        yield served


def post(served, path, body, status=200):
    answer = requests.post(served.url + path, json=body, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_conversation_with_images(tiny, served, tmp_path):
    """The client of `trl chat` and a request of OpenAI's form get the same answer, which depends on the image."""
    answers = []
    for seed in (1, 4):
        picture(seed).save(path := tmp_path / f"{seed}.png")
        parts = [{"type": "image", "image": str(path)}, {"type": "text", "text": "what is it?"}]
        pieces = []
        generation = Generation(temperature=0, max_new_tokens=12)
        ServerSpeaker(served.url).answer([{"role": "user", "content": parts}], generation, pieces.append)
        parts = [{"type": "image_url", "image_url": {"url": data_url(picture(seed))}}, parts[1]]
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_completion_tokens": 12}
        (found,) = post(served, "/v1/chat/completions", {**body, "logprobs": True})["choices"]
        assert "".join(pieces) == found["message"]["content"]
        answers.append([each["logprob"] for each in found["logprobs"]["content"]])
    assert max(abs(a - b) for a, b in zip(*answers, strict=False)) > 0.01


def png(width, height):
    whole = BytesIO()
    Image.new("1", (width, height)).save(whole, format="PNG")
    return whole.getvalue()


def as_url(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/a.png", "this server neither downloads images"),
        ("file:///etc/passwd", "nor reads files"),
        ("/etc/passwd", "nor reads files"),
        ("data:text/plain;base64,YWJj", "as a data URL"),
        ("data:image/png;base64,***", "in base64 cannot be read"),
        (as_url(b"no image"), "does not contain an image in a format that Pillow can read"),
        (as_url(base64.b64decode(URL.partition(",")[2])[:-60]), "cannot be decoded"),
        (as_url(png(200, 200)), "40,000 pixels, but this server's max_request_pixels is 10,000"),
    ],
)
def test_bad_images_are_refused_in_words(tiny, served, url, words):
    place = tiny.processor.tokenizer.image_token_id
    generate = {"token_ids": [7, place, 8], "content_parts": [{"type": "image_url", "url": url}]}
    assert words in post(served, "/inference/v1/generate", generate, 400)["error"]["message"]
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    chat = {"messages": [{"role": "user", "content": parts}]}
    assert words in post(served, "/v1/chat/completions", chat, 400)["error"]["message"]


def test_places_and_images_have_to_agree(tiny, served):
    place, image = tiny.processor.tokenizer.image_token_id, {"type": "image_url", "url": URL}
    for token_ids, parts, words in (
        ([7, 8], [image], "1 images were given, but the tokens have 0 placeholders"),
        ([7, place, place], [image], "1 images were given, but the tokens have 2 placeholders"),
        ([7, place], [], "1 image tokens"),
        ([7, place], [{"type": "video_url", "url": URL}], "video_url"),
    ):
        body = {"token_ids": token_ids, "content_parts": parts}
        assert words in post(served, "/inference/v1/generate", body, 400)["error"]["message"]
    assert "image tokens" in post(served, "/v1/completions", {"prompt": [7, place]}, 400)["error"]["message"]


def test_a_model_of_texts_is_given_no_images():
    with serve(MODELS["llama"]().eval()) as served:
        body = {"token_ids": [5, 6], "content_parts": [{"type": "image_url", "url": URL}]}
        assert "cannot read images" in post(served, "/inference/v1/generate", body, 400)["error"]["message"]
        parts = [{"type": "image_url", "image_url": {"url": URL}}]
        body = {"messages": [{"role": "user", "content": parts}]}
        assert "cannot read images" in post(served, "/v1/chat/completions", body, 400)["error"]["message"]
        body = {"prompt": [7, 8], "temperature": 0, "max_tokens": 4, "return_token_ids": True}
        (first, *_), banned = (c["token_ids"] for c in post(served, "/v1/completions", body)["choices"]), {}
        banned = {**body, "logit_bias": {str(first[0]): -100}}
        (choice,) = post(served, "/v1/completions", banned)["choices"]
        assert first[0] not in choice["token_ids"]
        assert (
            "logit_bias" in post(served, "/v1/completions", {**body, "logit_bias": {"5": 1}}, 400)["error"]["message"]
        )


def test_an_adapter_on_what_reads_images_travels_merged(tiny):
    """vLLM's adapters are of the language layers alone; `trl serve` takes all of them."""
    own = ServerInfo("tiny", "raw_logprobs", "float32", 128, 99, 16, takes_adapters=True, is_own=True)
    for part, merged in (("language_model", False), ("vision_tower", True)):
        targets = rf".*{part}.*\.(q|v)_proj"
        policy = get_peft_model(copy.deepcopy(tiny.model), LoraConfig(r=2, target_modules=targets))
        reason = needs_merged_weights(policy, [replace(own, is_own=False)])
        assert (reason == "it adapts the image encoder, which vLLM does not support") == merged
        assert needs_merged_weights(policy, [own]) is None


class Told(Server):
    """A server that answers as it was told to."""

    def __init__(self, **answer) -> None:
        super().__init__("http://elsewhere", timeout=1)
        self.answer, self.sent = answer, []

    def post(self, path, body=None, **_):
        self.sent.append((path, body))
        return self.answer


def choice(*ids, logprob=-1.0):
    content = [{"token_id": token, "logprob": logprob} for token in ids]
    return {"index": 0, "token_ids": list(ids), "logprobs": {"content": content}, "finish_reason": "length"}


PROMPT = SentPrompt([7, 9, 9, 8], unexpanded=[7, 9, 8], images=[URL])
TWO = SamplingParams(max_new_tokens=2, seed=1, banned_tokens=(9,))


def test_what_a_server_is_asked_after_images():
    server = Told(prompt_token_ids=[7, 9, 9, 8], choices=[choice(4, 5)])
    (rollout,) = server.complete_after_images(PROMPT, TWO, 1, "m", 99)
    assert (rollout.ids, rollout.logprobs) == ((4, 5), (-1.0, -1.0))
    ((path, body),) = server.sent
    assert path == "/inference/v1/generate"
    assert (body["token_ids"], body["content_parts"]) == ([7, 9, 8], [{"type": "image_url", "url": URL}])
    assert body["sampling_params"]["logit_bias"] == {"9": -100.0}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"choices": [choice(4, 5)]}, "does not return the token ids of the expanded prompt.*--enable-scale-out"),
        (
            {"prompt_token_ids": [7, 9, 8], "choices": [choice(4, 5)]},
            "3 tokens there and 4 in the trainer.*index 2 on",
        ),
        ({"prompt_token_ids": PROMPT.ids, "choices": []}, "0 samples, but 1 were requested"),
        ({"prompt_token_ids": PROMPT.ids, "choices": [choice(4, 5) | {"token_ids": [4, 6]}]}, "of other tokens than"),
        ({"prompt_token_ids": PROMPT.ids, "choices": [choice(4, 5, logprob=2.0)]}, "not finite numbers of at most 0"),
    ],
)
def test_answers_that_are_not_the_trainers_prompt_are_refused(answer, words):
    with pytest.raises(EngineError, match=words):
        Told(**answer).complete_after_images(PROMPT, TWO, 1, "m", 99)


def test_a_server_that_sees_other_images_is_found_out(tiny, tmp_path):
    """Its processor makes as many tokens of an image, and other pixels."""
    other = copy.deepcopy(tiny.processor)
    other.image_processor.image_mean, other.image_processor.image_std = [1.0, 0.0, 0.5], [0.05] * 3
    _, prompt = asked(tiny, "*see this", [picture(1)])
    with serve(copy.deepcopy(tiny.model), other) as served:
        engine = ServerEngine(served.url, tiny.processor.tokenizer, sync_dir=tmp_path)
        engine.sync(tiny.model, 1)
        with pytest.raises(EngineError, match="does not process images as the trainer does"):
            engine.generate([prompt], GREEDY)
        with pytest.raises(DataError, match="model inputs besides its token ids"):
            engine.generate([replace(prompt, unexpanded=None)], GREEDY)
        engine.close()
