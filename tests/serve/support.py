"""A server in this process, on a port of its own, and models to serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tests.conftest import make_tokenizer
from trl.cli.serve.app import make_app
from trl.cli.serve.arguments import ServeArguments
from trl.cli.serve.worker import ModelWorker

PATIENCE = 120.0


class Served:
    """A server that runs, the worker behind it, and what was asked of it."""

    def __init__(self, url: str, worker: ModelWorker, server: uvicorn.Server) -> None:
        self.url, self.worker, self.server = url, worker, server
        self.asked: list[str] = []


@contextmanager
def serving(app, worker=None) -> Iterator[Served]:
    """Any ASGI application at a free port of this machine."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{socket.getsockname()[1]}", worker, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        socket.close()


@contextmanager
def serve(model, tokenizer=None, name="tiny", **options) -> Iterator[Served]:
    """`trl serve` of `model`, in this process."""
    worker = ModelWorker(model, tokenizer or make_tokenizer())
    app = make_app(worker, name, ServeArguments(**options))
    asked: list[str] = []

    async def recorded(scope, receive, send):
        if scope["type"] == "http":
            asked.append(scope["path"])
        await app(scope, receive, send)

    try:
        with serving(recorded, worker) as served:
            served.asked = asked
            yield served
    finally:
        worker.close()
