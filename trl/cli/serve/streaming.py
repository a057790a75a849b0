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


async def streamed(
    worker: ModelWorker,
    answer: Mapping[str, Any],
    body: Mapping[str, Any],
    messages: list,
    generation: Generation,
    adapter: str | None,
    prompt: int,
) -> Response:
    """The response that streams the answer to `messages`, sampled by a thread of its own, one at a time on the model.

    `answer` holds the fields with which its events begin, `prompt` the tokens of the prompt.
    """
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
            pieces.put_nowait(await asyncio.to_thread(worker.stream, messages, generation, say, adapter))
        except Exception as error:  # told to who listens, in the stream
            pieces.put_nowait(error)

    async def events(item: str | BaseException | int, sampling: asyncio.Task) -> AsyncIterator[str]:
        try:
            yield _event(delta(answer, {"role": "assistant", "content": ""}))
            while isinstance(item, str):
                yield _event(delta(answer, {"content": item}))
                item = await pieces.get()
            await sampling
            if isinstance(item, BaseException):
                yield _event({"error": {"message": str(item), "code": 500}})
                return
            yield _event(delta(answer, {}, "length" if item >= generation.max_new_tokens else "stop"))
            if (body.get("stream_options") or {}).get("include_usage"):
                yield _event({**answer, "choices": [], "usage": usage(prompt, item)})
            yield "data: [DONE]\n\n"
        finally:
            left.set()

    sampling = asyncio.create_task(run())
    first = await pieces.get()
    if isinstance(first, BaseException):
        raise first
    return StreamingResponse(events(first, sampling), media_type="text/event-stream")


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
