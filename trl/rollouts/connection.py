"""One rollout server over HTTP: what is asked of it, within which time, and what its answers have to look like.

Every way in which a server can fail is an `EngineError` with its URL and what was asked: `Unreachable` where another server, or
the same one later, may do better; `Refused` where the request itself was turned down, in the server's own words.
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
"""Requests under way at a server of vLLM, which batches them itself; their connections stay open."""

CONNECT = 10.0
"""Seconds in which a connection has to come about."""

SHOWN = 400
"""Characters of an answer in an error."""

ABSENT = (404, 405)
TRY_LATER = (408, 425, 429)
BANNED = -100.0
"""Bias of a token that is not to be sampled."""

GENERATE = "/inference/v1/generate"
IMAGES_NEED = (
    "Prompts with images go to a route that takes token ids and images: start the server with `trl vllm-serve` or `trl serve`; "
    "it is vLLM 0.32 or later with --enable-scale-out."
)
FINAL_ONLY = 2
"""How vLLM is told to answer once, with whole samples."""

REASONS = ("stop", "length")
"""How a completion may have ended that is learned from; one that was aborted is sampled again."""


class Unreachable(EngineError):
    """A server that is down, too slow, or answers what cannot be understood."""


class Refused(EngineError):
    """A request that a server turned down; asking again is no use."""


@dataclass(frozen=True)
class SentPrompt:
    """A prompt on its way to a server, from any process.

    ids              with all tokens of its images
    max_new_tokens   a limit of its own, or None
    unexpanded       the ids with one place for each image, where it has some
    images           those, as data URLs
    has_inputs       whether it has inputs that are not sent
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
    """The server at `url`. Answers have to come within `timeout` seconds. Any thread may ask."""

    def __init__(self, url: str, *, timeout: float, api_key: str | None = None) -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.version: str | None = None
        """The weights that it has; None if that is not known."""
        self.reads_images = False
        """Whether its model does, so that it keeps what earlier weights made of them."""
        self._session = requests.Session()
        self._session.trust_env = False  # servers are reached directly, with no key but their own
        self._session.mount(self.url, HTTPAdapter(pool_connections=1, pool_maxsize=CONNECTIONS))
        self.under_way: dict[int, tuple[str, float]] = {}
        """What threads are asking it, and since when."""

    def get(self, path: str, *, timeout: float | None = None, **params: Any) -> Any:
        return self._ask("GET", path, None, params, timeout or self.timeout)

    def post(self, path: str, body: Any = None, *, timeout: float | None = None, **params: Any) -> Any:
        return self._ask("POST", path, body, params, timeout or self.timeout)

    @contextmanager
    def _noted(self, asked: str) -> Iterator[None]:
        thread = threading.get_ident()
        self.under_way[thread] = asked, time.monotonic()
        try:
            yield
        finally:
            del self.under_way[thread]

    def _ask(self, method: str, path: str, body: Any, params: Mapping[str, Any], timeout: float) -> Any:
        """The answer: what its JSON says, or its text. Raises Unreachable or Refused."""
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
            raise Unreachable(f"{asked}: no whole answer within {timeout:g} seconds.") from error
        except requests.RequestException as error:
            raise Unreachable(f"{asked}: {_cause(error)}.") from error
        if response.status_code >= 500 or response.status_code in TRY_LATER:
            raise Unreachable(f"{asked}: the server failed ({response.status_code}): {_words(content)}")
        if not response.ok:
            raise Refused(f"{asked}: the server refused ({response.status_code}): {_words(content)}")
        if "json" not in response.headers.get("content-type", ""):
            return content.decode("utf-8", "replace")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unreachable(f"{asked}: the answer is not JSON: {content[:SHOWN]!r}.") from error

    def info(self, timeout: float) -> ServerInfo:
        """What the server says of its model within `timeout` seconds. Raises Refused for one that does not say it."""
        try:
            found = self.get("/server_info", timeout=timeout, config_format="json")
        except Refused as error:
            if _is_absent(error):
                raise Refused(
                    f"{error} A trainer needs the routes of vLLM's developer mode: start the server with `trl vllm-serve`, or "
                    "with VLLM_SERVER_DEV_MODE=1 in its environment."
                ) from error
            raise
        try:
            return read_info(found, str(self.get("/v1/models", timeout=timeout)["data"][0]["id"]))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise Unreachable(
                f"GET {self.url}/server_info: the answer is not that of a vLLM server: {_shown(found)}"
            ) from error

    def complete(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, model: str, vocabulary: int
    ) -> list[list[Rollout]]:
        """n samples of each prompt, with every sampling parameter said. Raises Unreachable for an answer that is not that."""
        answer = self.post("/v1/completions", completion_body(prompts, params, n, model))
        asked = f"POST {self.url}/v1/completions (n={n} of {len(prompts)} prompts)"
        with _answer_checked(asked, answer):
            return _rollouts(answer, prompts, params, n, vocabulary, self.version)

    def complete_after_images(
        self, prompt: SentPrompt, params: SamplingParams, n: int, model: str, vocabulary: int
    ) -> list[Rollout]:
        """n samples of a prompt with images. Raises Refused where the server expands it to other tokens than the trainer."""
        asked = f"POST {self.url}{GENERATE} (n={n}, {len(prompt.images)} images)"
        try:
            answer = self.post(GENERATE, image_body(prompt, params, n, model))
        except Refused as error:
            raise Refused(f"{error} {IMAGES_NEED if _is_absent(error) else ''}".rstrip()) from error
        told = answer.get("prompt_token_ids") if isinstance(answer, Mapping) else None
        if not isinstance(told, list):
            raise Refused(f"{asked}: the server does not say which tokens it made of the prompt. {IMAGES_NEED}")
        if told != list(prompt.ids):
            raise Refused(f"{asked}: {other_tokens(told, prompt.ids)}")
        with _answer_checked(asked, answer):
            choices = [_as_completion(choice) for choice in answer["choices"]]
            return _rollouts({"choices": choices}, [prompt.ids], params, n, vocabulary, self.version)[0]


@contextmanager
def _answer_checked(asked: str, answer: Any) -> Iterator[None]:
    """Errors of reading an answer as one that is not what was asked for."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise Unreachable(f"{asked}: the answer is not what was asked for: {reason}. {_shown(answer)}") from error


def _is_absent(error: Refused) -> bool:
    return any(f"({status})" in str(error) for status in ABSENT)


def other_tokens(told: Sequence[int], wanted: Sequence[int]) -> str:
    """How the tokens that a sampler made of a prompt with images differ from the trainer's."""
    first = next((i for i, (a, b) in enumerate(zip(told, wanted, strict=False)) if a != b), min(len(told), len(wanted)))
    return (
        f"the prompt with its images is {len(told)} tokens there and {len(wanted)} in the trainer, and they differ from number "
        f"{first} on. Serve the model from a folder with the trainer's own processor (processor.save_pretrained), and give it "
        "no --mm-processor-kwargs; families whose prompts vLLM builds in another order are sampled in process."
    )


def _read(response: requests.Response, end: float) -> bytes:
    parts = []
    for part in response.iter_content(2**16):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _cause(error: BaseException) -> str:
    """The innermost reason of what requests raises, which wraps several layers of errors."""
    text = str(error)
    if isinstance(error, requests.ConnectionError) and "refused" in text:
        return "the connection was refused, as by a port where no server runs"
    return f"{type(error).__name__}: {text[:SHOWN]}"


def _words(content: bytes) -> str:
    """The message in an error, of whichever shape."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        while isinstance(found, dict):
            found = found.get("error") or found.get("message") or found.get("detail") or text
    except (ValueError, RecursionError):
        found = text
    return f"{' '.join(str(found).split())[:SHOWN]}."


def _shown(answer: Any) -> str:
    return f"It says {repr(answer)[:SHOWN]}"


def completion_body(prompts: Sequence[Sequence[int]], params: SamplingParams, n: int, model: str) -> dict[str, Any]:
    """All of `params` said, so that no default of the server or of its model's generation config holds."""
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
    """The same for a prompt with images: ids from before expansion, and the server says what it made of them."""
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
    """A choice of the route for tokens as one of the route for completions."""
    content = choice["logprobs"]["content"]
    if [each["token_id"] for each in content] != choice["token_ids"]:
        raise ValueError("log-probabilities of other tokens than were sampled")
    return {**choice, "logprobs": {"token_logprobs": [each["logprob"] for each in content]}}


def _rollouts(
    answer: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    n: int,
    vocabulary: int,
    version: str | None,
) -> list[list[Rollout]]:
    """The samples by prompt. Raises ValueError, KeyError or TypeError for anything but the samples asked for."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(n * len(prompts))):
        raise ValueError(f"{len(choices)} samples came, and {n * len(prompts)} were asked for")
    rollouts = []
    for choice in choices:
        prompt = list(prompts[choice["index"] // n])
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise ValueError("a prompt came back as other tokens than were sent")
        rollouts.append(_rollout(choice, params.max_new_tokens, vocabulary, version))
    return [rollouts[i * n : (i + 1) * n] for i in range(len(prompts))]


def _rollout(choice: Mapping[str, Any], limit: int, vocabulary: int, version: str | None) -> Rollout:
    ids, reason = choice["token_ids"], choice["finish_reason"]
    logprobs = choice["logprobs"]["token_logprobs"]
    if len(logprobs) != len(ids):
        raise ValueError(f"{len(logprobs)} log-probabilities of {len(ids)} tokens")
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise ValueError(f"tokens that are not of the model's vocabulary of {vocabulary}")
    if not all(isinstance(value, int | float) and isfinite(value) and value <= 1e-3 for value in logprobs):
        raise ValueError("log-probabilities that are no numbers of at most 0")
    if not 1 <= len(ids) <= limit or reason not in REASONS:
        raise ValueError(f"{len(ids)} tokens of at most {limit}, ended by {reason!r}")
    step = int(version) if version is not None and version.isdigit() else None
    return Rollout(tuple(ids), tuple(map(float, logprobs)), reason, version=step)
