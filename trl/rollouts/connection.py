"""An HTTP client for one rollout server: requests, timeouts, and validation of the answers.

Every failure of a server raises an `EngineError` that names its URL and the request: `Unreachable` where another server, or
the same one later, may succeed; `Refused` where the server rejected the request itself, with the server's message.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from trl.errors import EngineError
from trl.rollouts.engine import Prompt, Rollout
from trl.rollouts.sampling import SamplingParams
from trl.rollouts.server_info import ServerInfo, read_info
from trl.vision.images import data_url

CONNECTIONS = 32
"""Most concurrent requests to a vLLM server, which batches them itself; connections are kept open."""

CONNECT = 10.0
"""Timeout in seconds for opening a connection."""

SHOWN = 400
"""Most characters of an answer that an error message quotes."""

TRY_LATER = (408, 425, 429)
BANNED = -100.0
"""Logit bias of a banned token."""

GENERATE = "/inference/v1/generate"
IMAGES_NEED = (
    "Prompts with images need a route that takes token ids and images: start the server with `trl vllm-serve` (vLLM 0.32 or "
    "later with --enable-scale-out) or with `trl serve`."
)
FINAL_ONLY = 2
"""vLLM's `output_kind` for a single answer with complete samples."""

REASONS = ("stop", "length")
"""Finish reasons of completions that are trained on; after any other, the request is repeated."""


class Unreachable(EngineError):
    """A server is down, too slow, or gives an answer that cannot be understood; a retry may succeed."""


class Refused(EngineError):
    """A server rejected a request; a retry would fail again."""


class NoRoute(Refused):
    """A server has no route for the request (404), or not with this method (405)."""


@dataclass(frozen=True)
class SentPrompt:
    """A prompt in the form in which it is sent to the main process and to a server.

    ids              token ids, with all tokens of its images
    max_new_tokens   the prompt's own limit, or None
    unexpanded       token ids with one placeholder per image, if it has images
    images           its images, as data URLs
    has_inputs       whether it has model inputs that cannot be sent
    """

    ids: Sequence[int]
    max_new_tokens: int | None = None
    unexpanded: Sequence[int] = ()
    images: Sequence[str] = ()
    has_inputs: bool = False

    @classmethod
    def of(cls, prompt: Prompt) -> SentPrompt:
        own = prompt.unexpanded
        if own is None:
            return cls(list(prompt.ids), prompt.max_new_tokens, has_inputs=bool(prompt.inputs))
        return cls(list(prompt.ids), prompt.max_new_tokens, list(own.ids), list(map(data_url, own.images)))


class Server:
    """The server at `url`. A request may take `timeout` seconds. Safe to use from several threads."""

    def __init__(self, url: str, *, timeout: float, api_key: str | None = None) -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.version: str | None = None
        """The version of its weights; None if unknown."""
        self.reads_images = False
        """Whether its model takes images: it then has a cache of image features, to be reset with new weights."""
        self._session = requests.Session()
        self._session.trust_env = False  # no proxies and no .netrc: they are not for rollout servers
        self._session.mount(self.url, HTTPAdapter(pool_connections=1, pool_maxsize=CONNECTIONS))
        self.under_way: dict[int, tuple[str, float]] = {}
        """The requests in progress by thread: what is requested, and since when (monotonic seconds)."""

    def get(self, path: str, *, timeout: float | None = None, **params: Any) -> Any:
        return self._ask("GET", path, None, params, timeout or self.timeout)

    def post(self, path: str, body: Any = None, *, timeout: float | None = None, **params: Any) -> Any:
        return self._ask("POST", path, body, params, timeout or self.timeout)

    def close(self) -> None:
        """Close the open connections."""
        self._session.close()

    @contextmanager
    def _noted(self, asked: str) -> Iterator[None]:
        thread = threading.get_ident()
        self.under_way[thread] = asked, time.monotonic()
        try:
            yield
        finally:
            del self.under_way[thread]

    def _ask(self, method: str, path: str, body: Any, params: Mapping[str, Any], timeout: float) -> Any:
        """Send a request, and return the answer's parsed JSON, or else its text. Raises Unreachable or Refused."""
        asked, end = f"{method} {self.url}{path}", time.monotonic() + timeout
        limits = (min(CONNECT, timeout), timeout)
        try:
            with (
                self._noted(asked),
                self._session.request(
                    method, self.url + path, json=body, params=params, headers=self.headers, timeout=limits, stream=True
                ) as response,
            ):
                content = _read(response, end)
        except (requests.Timeout, TimeoutError) as error:
            raise Unreachable(f"{asked}: no complete answer within {timeout:g} seconds.") from error
        except requests.RequestException as error:
            raise Unreachable(f"{asked}: {_cause(error)}.") from error
        if response.status_code >= 500 or response.status_code in TRY_LATER:
            raise Unreachable(f"{asked}: the server failed ({response.status_code}): {_words(content)}")
        if not response.ok:
            refusal = NoRoute if response.status_code in (404, 405) else Refused
            raise refusal(f"{asked}: the server refused ({response.status_code}): {_words(content)}")
        if "json" not in response.headers.get("content-type", ""):
            return content.decode("utf-8", "replace")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unreachable(f"{asked}: the answer is not JSON: {content[:SHOWN]!r}.") from error

    def info(self, timeout: float) -> ServerInfo:
        """The server's description of its model, within `timeout` seconds. Raises Refused if it has no such route."""
        try:
            found = self.get("/server_info", timeout=timeout, config_format="json")
        except NoRoute as error:
            raise Refused(
                f"{error} A trainer needs the routes of vLLM's developer mode: start the server with `trl vllm-serve`, or "
                "with VLLM_SERVER_DEV_MODE=1 in its environment."
            ) from error
        try:
            return read_info(found, str(self.get("/v1/models", timeout=timeout)["data"][0]["id"]))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise Unreachable(
                f"GET {self.url}/server_info: the answer is not that of a vLLM server: {_shown(found)}"
            ) from error

    def complete(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, model: str, vocabulary: int
    ) -> list[list[Rollout]]:
        """n samples of each prompt, with all sampling parameters sent explicitly. Raises Unreachable for an invalid answer."""
        answer = self.post("/v1/completions", completion_body(prompts, params, n, model))
        asked = f"POST {self.url}/v1/completions (n={n} of {len(prompts)} prompts)"
        with _answer_checked(asked, answer):
            return _rollouts(answer, prompts, params, n, vocabulary, self.version)

    def complete_after_images(
        self, prompt: SentPrompt, params: SamplingParams, n: int, model: str, vocabulary: int
    ) -> list[Rollout]:
        """n samples of a prompt with images. Raises Refused if the server expands the images to other tokens than the
        trainer."""
        asked = f"POST {self.url}{GENERATE} (n={n}, {len(prompt.images)} images)"
        try:
            answer = self.post(GENERATE, image_body(prompt, params, n, model))
        except NoRoute as error:
            raise Refused(f"{error} {IMAGES_NEED}") from error
        told = answer.get("prompt_token_ids") if isinstance(answer, Mapping) else None
        if not isinstance(told, list):
            raise Refused(f"{asked}: the server does not return the token ids of the expanded prompt. {IMAGES_NEED}")
        if told != list(prompt.ids):
            raise Refused(f"{asked}: {other_tokens(told, prompt.ids)}")
        with _answer_checked(asked, answer):
            choices = [_as_completion(choice) for choice in answer["choices"]]
            return _rollouts({"choices": choices}, [prompt.ids], params, n, vocabulary, self.version)[0]


@contextmanager
def _answer_checked(asked: str, answer: Any) -> Iterator[None]:
    """Within it, errors in reading an answer are raised as `Unreachable`, with the request and the answer."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise Unreachable(f"{asked}: the answer is invalid: {reason}. {_shown(answer)}") from error


def other_tokens(told: Sequence[int], wanted: Sequence[int]) -> str:
    """An error message for a prompt with images that a sampler expands to other tokens than the trainer."""
    first = next((i for i, (a, b) in enumerate(zip(told, wanted, strict=False)) if a != b), min(len(told), len(wanted)))
    return (
        f"the prompt with its images has {len(told)} tokens there and {len(wanted)} in the trainer, and they differ from index "
        f"{first} on. Serve the model from a folder with the trainer's own processor (processor.save_pretrained), and without "
        "--mm-processor-kwargs; if vLLM builds prompts of this model family in another order, sample in process."
    )


def _read(response: requests.Response, end: float) -> bytes:
    parts = []
    for part in response.iter_content(2**16):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _cause(error: BaseException) -> str:
    """A short description of an error of `requests`, whose messages are long."""
    text = str(error)
    if isinstance(error, requests.ConnectionError) and "refused" in text:
        return "the connection was refused (is a server running at this port?)"
    return f"{type(error).__name__}: {text[:SHOWN]}"


def _words(content: bytes) -> str:
    """The message in the body of an error response, for the various JSON layouts of servers."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        while isinstance(found, dict):
            found = found.get("error") or found.get("message") or found.get("detail") or text
    except (ValueError, RecursionError):
        found = text
    return f"{' '.join(str(found).split())[:SHOWN]}."


def _shown(answer: Any) -> str:
    return f"The answer was {repr(answer)[:SHOWN]}"


def completion_body(prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, model: str) -> dict[str, Any]:
    """Body of a completion request. It gives all sampling parameters, so that no default of the server or of its model's
    generation config applies."""
    return {
        "model": model,
        "prompt": [list(prompt) for prompt in prompts],
        **sampling_body(params, n),
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": False,
    }


def image_body(prompt: SentPrompt, params: SamplingParams, n: int, model: str) -> dict[str, Any]:
    """Body of a request for a prompt with images: unexpanded token ids; the server returns the expanded ones."""
    return {
        "model": model,
        "token_ids": list(prompt.unexpanded),
        "content_parts": [{"type": "image_url", "url": url} for url in prompt.images],
        "sampling_params": {**sampling_body(params, n), "logprobs": 0, "output_kind": FINAL_ONLY},
        "return_token_ids": True,
        "stream": False,
    }


def sampling_body(params: SamplingParams, n: int) -> dict[str, Any]:
    """The sampling parameters of a request."""
    return {
        "n": n,
        "max_tokens": params.max_new_tokens,
        "min_tokens": params.min_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "seed": params.seed,
        **({"logit_bias": {str(token): BANNED for token in params.banned_tokens}} if params.banned_tokens else {}),
    }


def _as_completion(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a choice of the `GENERATE` route to the format of the completions route."""
    content = choice["logprobs"]["content"]
    if [each["token_id"] for each in content] != choice["token_ids"]:
        raise ValueError("its log-probabilities are of other tokens than the sampled ones")
    return {**choice, "logprobs": {"token_logprobs": [each["logprob"] for each in content]}}


def _rollouts(
    answer: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    vocabulary: int,
    version: str | None,
) -> list[list[Rollout]]:
    """The n samples of each prompt. Raises ValueError, KeyError or TypeError for an answer that is not exactly that."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(n * len(prompts))):
        raise ValueError(f"it has {len(choices)} samples, but {n * len(prompts)} were requested")
    rollouts = []
    for choice in choices:
        prompt = list(prompts[choice["index"] // n])
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise ValueError("it returns a prompt with other tokens than were sent")
        rollouts.append(_rollout(choice, params.max_new_tokens, vocabulary, version))
    return [rollouts[i * n : (i + 1) * n] for i in range(len(prompts))]


def _rollout(choice: Mapping[str, Any], limit: int, vocabulary: int, version: str | None) -> Rollout:
    ids, reason = choice["token_ids"], choice["finish_reason"]
    logprobs = choice["logprobs"]["token_logprobs"]
    if len(logprobs) != len(ids):
        raise ValueError(f"it has {len(logprobs)} log-probabilities for {len(ids)} tokens")
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise ValueError(f"it has token ids outside the model's vocabulary of {vocabulary}")
    if not all(isinstance(value, int | float) and isfinite(value) and value <= 1e-3 for value in logprobs):
        raise ValueError("it has log-probabilities that are not finite numbers of at most 0")
    if not 1 <= len(ids) <= limit or reason not in REASONS:
        raise ValueError(f"a completion has {len(ids)} tokens (limit {limit}) and the finish reason {reason!r}")
    step = int(version) if version is not None and version.isdigit() else None
    return Rollout(tuple(ids), tuple(map(float, logprobs)), reason, version=step)
