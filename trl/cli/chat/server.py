"""A model on an OpenAI-compatible server, asked over HTTP with the standard library.

POST {url}/chat/completions  {"messages": …, "stream": true}      one event a line:  data: {"choices": [{"delta": …}]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from trl.cli.chat.arguments import ChatArguments, Generation
from trl.cli.chat.talk import Message, Say, Stream, TooLong
from trl.errors import ConfigError, TrlError

KEY = "OPENAI_API_KEY"
SENT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
"""Options that are sent where they are set; the server's own hold where they are not."""

Json = dict[str, Any]


class ServerError(TrlError):
    """What a server refused, or that it could not be reached."""


class ServerSpeaker:
    """Answers with the model `name` of the server at `url`; its first model, without a name."""

    def __init__(
        self,
        url: str,
        name: str | None = None,
        *,
        timeout: float = 300.0,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"server={url!r} is not a URL: give one such as http://localhost:8000.")
        self.url = url.rstrip("/") if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1"
        self.timeout, self.template_kwargs = timeout, template_kwargs
        self.name = name or self._first_model()
        self.details, self.notes = f"at {self.url}", ()

    def answer(self, messages: Sequence[Message], generation: Generation, say: Say) -> int:
        """Pass on what the server sends. Returns the tokens that it says it has made, 0 if it says nothing of them."""
        stream, tokens = Stream(say, generation.stop), 0
        with self._open("chat/completions", self._body(messages, generation)) as response:
            for event in map(self._parsed, read_events(response)):
                if "error" in event:
                    raise ServerError(f"{self.url} broke off: {_reason(event)}")
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event.get("choices") or ():
                    stream.put((choice.get("delta") or {}).get("content") or "")
        stream.end()
        return tokens

    def _body(self, messages: Sequence[Message], generation: Generation) -> Json:
        options = {name: value for name, value in asdict(generation).items() if name in SENT and value is not None}
        if generation.greedy:
            options["temperature"] = 0.0
        if self.template_kwargs:
            options["chat_template_kwargs"] = dict(self.template_kwargs)
        return {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": generation.max_new_tokens,
            **options,
        }

    def _first_model(self) -> str:
        with self._open("models") as response:
            found = self._parsed(response.read()).get("data") or []
        if not found:
            raise ServerError(f"{self.url} offers no model: name one with --model_name_or_path.")
        return found[0]["id"]

    def _parsed(self, text: str | bytes) -> Json:
        """A JSON object that the server sent."""
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerError(f"server={self.url} does not answer as an OpenAI-compatible server does: {text[:80]!r}.")
        return found

    def _open(self, path: str, body: Json | None = None) -> Any:
        """The server's response. Raises TooLong or ServerError, with its own words."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urlopen(Request(f"{self.url}/{path}", data, headers), timeout=self.timeout)
        except HTTPError as error:
            raise self._refusal(error) from None
        except URLError as error:
            raise ServerError(f"server={self.url}: it cannot be reached ({error.reason}). Is it running?") from None

    def _refusal(self, error: HTTPError) -> TrlError:
        text = error.read().decode("utf-8", "replace")
        try:
            reason = _reason(json.loads(text))
        except json.JSONDecodeError:
            reason = " ".join(text.split())[:300] or str(error.reason)
        if error.code in (400, 413, 422) and "context" in text:
            return TooLong(f"{self.url} says: {reason}")
        hint = f" Its key is read from the environment variable {KEY}." if error.code == 401 else ""
        return ServerError(f"{self.url} refused ({error.code}): {reason}{hint}")


def _reason(answer: Any) -> str:
    """The message in an error of any of the shapes that servers give it."""
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or answer.get("detail") or json.dumps(answer)
    return str(answer)


def read_events(lines: Iterator[bytes]) -> Iterator[str]:
    """The data of server-sent events, up to [DONE]. Raises ServerError if they end without it."""
    for line in lines:
        field, _, data = line.decode("utf-8", "replace").strip().partition(":")
        if field != "data":
            continue
        if data.strip() == "[DONE]":
            return
        yield data.strip()
    raise ServerError("The server broke off in the middle of its answer.")


def connect(arguments: ChatArguments, name: str | None) -> ServerSpeaker:
    """The speaker behind `--server`."""
    return ServerSpeaker(
        arguments.server, name, timeout=arguments.server_timeout, template_kwargs=arguments.chat_template_kwargs
    )
