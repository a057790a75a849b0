"""Servers that do everything wrong: each is an error with its URL and what was asked of it, within its limit."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.rollouts.test_rollouts_server import PARAMS, PROMPTS, QUICK, ids, server_info, tiny
from tests.serve.support import serving
from trl.errors import EngineError
from trl.rollouts.dispatch import Retries
from trl.rollouts.server import ServerEngine


@pytest.fixture
def model():
    return tiny()


def choices(prompt, n, limit, **changes):
    one = {
        "token_ids": [5] * limit,
        "prompt_token_ids": prompt,
        "finish_reason": "length",
        "logprobs": {"token_logprobs": [-1.0] * limit},
        **changes,
    }
    return {"choices": [{"index": i, **one} for i in range(n)]}


async def half(body):
    text = json.dumps(choices(body["prompt"][0], body["n"], body["max_tokens"]))
    return Response(text[:40], headers={"content-length": str(len(text)), "content-type": "application/json"})


async def never(_):
    await asyncio.sleep(30)
    return JSONResponse({})


ANY = {"prompt": [[7]], "n": 1, "max_tokens": 4}
"""A body for answers at other routes."""


def answering(make):
    async def answer(body):
        return JSONResponse(make(body["prompt"][0], body["n"], body["max_tokens"]))

    return answer


def raw(text):
    async def answer(_):
        return Response(text, media_type="application/json")

    return answer


BAD = {
    "500": (
        lambda body: asyncio.sleep(0, PlainTextResponse("EngineCore encountered an issue", 500)),
        r"failed \(500\): EngineCore encountered an issue",
    ),
    "refuses": (
        lambda body: asyncio.sleep(0, JSONResponse({"error": {"message": "too long for us"}}, 400)),
        r"refused \(400\): too long for us",
    ),
    "half a body": (half, "IncompleteRead|ChunkedEncodingError|ConnectionError"),
    "never": (never, "no complete answer within 0.4 seconds"),
    "garbage": (raw("<html>"), "the answer is not JSON: b'<html>'"),
    "another shape": (raw('{"choices": 3}'), "the answer is invalid"),
    "too few": (answering(lambda p, n, c: choices(p, n - 1, c)), "1 samples, but 2 were requested"),
    "other prompt": (answering(lambda p, n, c: choices([1], n, c)), "other tokens than were sent"),
    "foreign tokens": (answering(lambda p, n, c: choices(p, n, c, token_ids=[99] * c)), "vocabulary of 99"),
    "too many tokens": (answering(lambda p, n, c: choices(p, n, c + 1)), r"7 tokens \(limit 6\)"),
    "no numbers": (answering(lambda p, n, c: choices(p, n, c, logprobs=None)), "the answer is invalid"),
    "NaN": (
        raw(json.dumps(choices([7], 2, 6, prompt_token_ids=None, logprobs={"token_logprobs": [float("nan")] * 6}))),
        "not finite numbers",
    ),
    "aborted": (answering(lambda p, n, c: choices(p, n, c, finish_reason="abort")), "finish reason 'abort'"),
}


def bad_server(answer, at="/v1/completions"):
    """Routes of vLLM, of which one, that which samples, is `answer`."""

    async def badly(request):
        return await answer(await request.json() if at == "/v1/completions" else ANY)

    async def fine(_):
        return JSONResponse({"success": True})

    async def info(_):
        return JSONResponse(server_info(logprobs_mode="raw_logits"))  # no check of the weights

    async def models(_):
        return JSONResponse({"data": [{"id": "bad"}]})

    posts = ("/pause", "/resume", "/collective_rpc", "/update_weight_version", "/reset_prefix_cache")
    routes = {**dict.fromkeys(("/health", *posts), fine), "/server_info": info, "/v1/models": models, at: badly}
    return Starlette(routes=[Route(path, route, methods=["GET", "POST"]) for path, route in routes.items()])


@pytest.mark.parametrize("case", BAD)
def test_bad_servers(model, case, tmp_path):
    answer, words = BAD[case]
    with serving(bad_server(answer)) as bad:
        engine = ServerEngine(bad.url, sync_dir=tmp_path, retries=QUICK)
        engine.sync(model, 0)
        engine.servers[0].timeout = 0.4 if case == "never" else 60
        start = time.monotonic()
        with pytest.raises(EngineError, match=words) as raised:
            engine.generate(PROMPTS[:1], PARAMS, 2)
        assert f"POST {bad.url}/v1/completions" in str(raised.value)
        assert time.monotonic() - start < 60
        engine.close()


@pytest.mark.parametrize(
    ("at", "case", "words"),
    [
        ("/health", "never", "GET {url}/health: no complete answer within 0.4 seconds.* To start one"),
        ("/server_info", "garbage", "GET {url}/server_info: the answer is not JSON"),
        ("/v1/models", "500", "GET {url}/v1/models: the server failed"),
        ("/pause", "never", "POST {url}/pause: no complete answer within 0.4 seconds"),
        ("/collective_rpc", "500", "No server has loaded the weights of step 0:.*POST {url}/collective_rpc: .* failed"),
        (
            "/collective_rpc",
            "refuses",
            "POST {url}/collective_rpc: .* too long for us.* Does the server see the folder",
        ),
        ("/reset_prefix_cache", "another shape", "POST {url}/reset_prefix_cache: the server did not reset"),
        ("/update_weight_version", "half a body", "POST {url}/update_weight_version: .*(IncompleteRead|Connection)"),
    ],
)
def test_servers_that_are_bad_at_taking_weights(model, at, case, words, tmp_path):
    """Each within its limit: the start's for what is asked there, a request's for the rest."""
    with serving(bad_server(BAD[case][0], at)) as bad:
        limit = 0.4 if case == "never" else 60
        engine = ServerEngine(
            bad.url, sync_dir=tmp_path, retries=Retries(most=0), timeout=limit, start_timeout=min(limit, 2)
        )
        start = time.monotonic()
        with pytest.raises(EngineError, match="(?s)" + words.format(url=bad.url)):
            engine.sync(model, 0)
        assert time.monotonic() - start < 30
        engine.close()


def test_a_long_wait_says_what_for(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl.rollouts.waits.SAY_EVERY", 0.1)
    with serving(bad_server(never, "/collective_rpc")) as bad:
        engine = ServerEngine(bad.url, sync_dir=tmp_path, retries=Retries(most=0), timeout=0.6)
        with pytest.raises(EngineError):
            engine.sync(model, 0)
    assert f"Waiting for POST {bad.url}/collective_rpc (0 s of at most 0.6 s)." in caplog.text
    assert not engine.servers[0].under_way


def test_a_good_server_does_the_work_of_a_bad_one(model, tmp_path):
    with serving(bad_server(BAD["500"][0])) as bad, serving(bad_server(answering(choices))) as good:
        engine = ServerEngine([bad.url, good.url], sync_dir=tmp_path, retries=QUICK, timeout=10)
        engine.sync(model, 0)
        assert ids(engine.generate(PROMPTS, PARAMS, 2)) == [[(5,) * 6] * 2] * 4
        engine.close()


def test_two_servers_work_at_the_same_time(model, tmp_path):
    """Each waits for the other's request to arrive, so neither would answer if requests came one after the other."""
    both = threading.Barrier(2, timeout=30)

    async def answer(body):
        await asyncio.to_thread(both.wait)
        return JSONResponse(choices(body["prompt"][0], body["n"], body["max_tokens"]))

    with serving(bad_server(answer)) as one, serving(bad_server(answer)) as two:
        engine = ServerEngine([one.url, two.url], sync_dir=tmp_path, retries=QUICK, timeout=60)
        engine.sync(model, 0)
        assert ids(engine.generate(PROMPTS[:2], PARAMS, 1)) == [[(5,) * 6]] * 2
        engine.close()
