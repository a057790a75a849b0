"""Chat with a model on an OpenAI-compatible server, through `huggingface_hub.InferenceClient`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, TextGenerationError
from huggingface_hub.utils import logging

from trl.cli.chat.arguments import ChatArguments, Generation
from trl.cli.chat.images import for_server
from trl.cli.chat.talk import Message, Say, Stream, TooLong
from trl.errors import ConfigError, TrlError
from trl.hub import outside_the_hub

KEY = "OPENAI_API_KEY"
STANDARD = ("temperature", "top_p", "stop", "seed")
EXTENSIONS = ("top_k", "min_p", "repetition_penalty")
"""Options that are sent if they are set; otherwise the server's defaults apply. The OpenAI API has only the standard
ones; servers of open models also accept the extensions."""

TRANSPORT = InferenceTimeoutError.__bases__[0]
"""`HTTPError` of the HTTP library that `huggingface_hub` uses, which differs between its releases."""

SHOWN = 300
"""Maximum characters of a server's reply in an error message."""


class ServerError(TrlError):
    """A server refused a request, or could not be reached."""


class ServerSpeaker:
    """Answers with the model `name` on the server at `url`; without a name, its first model."""

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
        key = os.environ.get(KEY)
        # None stops the client from sending the user's hub token to this server.
        self.headers = {"authorization": f"Bearer {key}" if key else None}
        self.name = name or self._guarded(self._first_model)
        self.details, self.notes = f"at {self.url}", ()

    def answer(self, messages: Sequence[Message], generation: Generation, say: Say) -> int:
        """Stream the server's answer. Return the number of tokens it reports, or 0 if it reports none."""
        stream, reply = Stream(say, generation.stop), _Reply()
        with InferenceClient(base_url=self.url, timeout=self.timeout, headers=self.headers) as client:
            chunks = self._guarded(lambda: client.chat_completion(**self._request(messages, generation)))
            while (piece := self._guarded(lambda: reply.next_piece(chunks))) is not None:
                stream.put(piece)
        stream.end()
        if not reply.finished:
            raise ServerError(f"{self.url} broke off in the middle of its answer.")
        return reply.tokens

    def _request(self, messages: Sequence[Message], generation: Generation) -> dict[str, Any]:
        options = {name: value for name, value in asdict(generation).items() if value is not None}
        if generation.greedy:
            options["temperature"] = 0.0
        extensions = {name: options[name] for name in EXTENSIONS if name in options}
        if self.template_kwargs:
            extensions["chat_template_kwargs"] = dict(self.template_kwargs)
        return {
            "model": self.name,
            "messages": for_server(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": generation.max_new_tokens,
            "extra_body": extensions,
            **{name: options[name] for name in STANDARD if name in options},
        }

    def check_reads_images(self) -> None:
        """Do nothing: the server itself refuses images that its model cannot read."""

    def _first_model(self) -> str:
        headers = {name: value for name, value in self.headers.items() if value}
        response = get_session().get(f"{self.url}/models", headers=headers, timeout=self.timeout)
        if response.is_error:
            raise self._refusal(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise ServerError(
                f"server={self.url} does not respond like an OpenAI-compatible server: {response.content[:80]!r}. If "
                "it lists no models, name one with --model_name_or_path."
            ) from error

    def _guarded(self, ask: Callable[[], Any]) -> Any:
        """Return `ask()`. Turn every error of the server or the client into a TrlError."""
        try:
            with outside_the_hub():
                return ask()
        except TrlError:
            raise
        except HfHubHTTPError as error:
            raise self._refusal(error.response) from error
        except TextGenerationError as error:
            raise ServerError(f"{self.url} broke off: {_reason(error.args[0])[:SHOWN]}") from error
        except TRANSPORT as error:
            raise ServerError(f"server={self.url}: it cannot be reached ({_shown(error)}). Is it running?") from error
        except Exception as error:  # which errors the client raises for malformed replies is not documented
            raise ServerError(
                f"server={self.url} does not respond like an OpenAI-compatible server: {_shown(error)}."
            ) from error

    def _refusal(self, response: Any) -> TrlError:
        try:
            reason = _reason(response.json())
        except (ValueError, RecursionError):
            reason = " ".join(response.text.split()) or str(response.reason_phrase)
        reason = reason[:SHOWN]
        if response.status_code in (400, 413, 422) and "context" in response.text:
            return TooLong(f"{self.url} says: {reason}")
        hint = f" Set the API key in the environment variable {KEY}." if response.status_code == 401 else ""
        return ServerError(f"{self.url} refused ({response.status_code}): {reason}{hint}")


class _Reply:
    """Reads the chunks of a streamed answer; keeps its token count, and whether it is complete."""

    def __init__(self) -> None:
        self.tokens, self.finished = 0, False

    def next_piece(self, chunks: Iterator[Any]) -> str | None:
        """The text of the next chunk, "" if it has none; None at the end."""
        chunk = next(chunks, None)
        if chunk is None:
            return None
        if chunk.usage is not None:
            self.tokens = int(chunk.usage.completion_tokens or 0)
        piece = ""
        for choice in chunk.choices or ():
            self.finished = self.finished or choice.finish_reason is not None
            piece += (choice.delta.content if choice.delta is not None else None) or ""
        return piece.encode("utf-8", "replace").decode()  # JSON may contain lone surrogates


def _reason(answer: Any) -> str:
    """The message in an error response, in whichever of the usual JSON forms."""
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or answer.get("detail") or json.dumps(answer)
    return str(answer)


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:SHOWN]


def connect(arguments: ChatArguments, name: str | None) -> ServerSpeaker:
    """Make the speaker for `--server`."""
    logging.set_verbosity_error()
    return ServerSpeaker(
        arguments.server, name, timeout=arguments.server_timeout, template_kwargs=arguments.chat_template_kwargs
    )
