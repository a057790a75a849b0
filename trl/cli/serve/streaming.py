"""Stream answers as server-sent events while they are sampled."""

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
    """The response that streams the answer to `messages`. A thread samples it, while nothing else runs on the model.

    `answer` holds the first fields of every event, `prompt` is the number of prompt tokens.
    """
    if (body.get("n") or 1) > 1 or body.get("logprobs"):
        raise ConfigError("With stream=True, n must be 1 and logprobs must be left out.")
    pieces: asyncio.Queue[str | BaseException | int] = asyncio.Queue()
    loop, left = asyncio.get_running_loop(), asyncio.Event()

    def say(piece: str) -> None:
        if left.is_set():
            raise ConnectionAbortedError("The client closed the connection.")
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    async def run() -> None:
        try:
            pieces.put_nowait(await asyncio.to_thread(worker.stream, messages, generation, say, adapter))
        except Exception as error:  # sent to the client as an event
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
