"""Answers that are sent while they are sampled, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response, StreamingResponse

from trl.cli.chat.arguments import Generation
from trl.cli.serve.answers import delta, usage
from trl.cli.serve.worker import ModelWorker
from trl.errors import ConfigError


class Streams:
    """Answers under way, each sampled by a thread of its own, one at a time on the model."""

    def __init__(self, worker: ModelWorker) -> None:
        self.worker = worker
        self.tasks: set[asyncio.Task] = set()

    async def answer(
        self,
        answer: Mapping[str, Any],
        body: Mapping[str, Any],
        messages: list,
        generation: Generation,
        adapter: str | None,
        prompt: int,
    ) -> Response:
        """The response that streams the answer to `messages`; `answer` holds the fields with which its events begin."""
        if (body.get("n") or 1) > 1 or body.get("logprobs"):
            raise ConfigError("With stream=True, n is 1 and logprobs are left out.")
        pieces: asyncio.Queue[str | BaseException | int] = asyncio.Queue()
        loop, left = asyncio.get_running_loop(), asyncio.Event()

        def say(piece: str) -> None:
            if left.is_set():
                raise ConnectionAbortedError("Nobody listens any more.")
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        async def run() -> None:
            try:
                tokens = await asyncio.to_thread(self.worker.stream, messages, generation, say, adapter)
                pieces.put_nowait(tokens)
            except Exception as error:  # told to who listens, in the stream
                pieces.put_nowait(error)

        task = asyncio.create_task(run())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        first = await pieces.get()
        if isinstance(first, BaseException):
            raise first
        events = self._events(answer, body, first, pieces, prompt, generation.max_new_tokens, left)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(
        self,
        answer: Mapping[str, Any],
        body: Mapping[str, Any],
        item: str | BaseException | int,
        pieces: asyncio.Queue,
        prompt: int,
        most: int,
        left: asyncio.Event,
    ) -> AsyncIterator[str]:
        try:
            yield _event(delta(answer, {"role": "assistant", "content": ""}))
            while isinstance(item, str):
                yield _event(delta(answer, {"content": item}))
                item = await pieces.get()
            if isinstance(item, BaseException):
                yield _event({"error": {"message": str(item), "code": 500}})
                return
            yield _event(delta(answer, {}, "length" if item >= most else "stop"))
            if (body.get("stream_options") or {}).get("include_usage"):
                yield _event({**answer, "choices": [], "usage": usage(prompt, item)})
            yield "data: [DONE]\n\n"
        finally:
            left.set()


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
