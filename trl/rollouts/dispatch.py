"""Distribute requests among servers: each server takes the next request when it is free; failed requests are retried.

    requests ──queue──▶ server 1 ──fails──▶ back into the queue; the server waits 1 s, 2 s, 4 s, …
                   └──▶ server 2 ──▶ answers, one per request

A server that fails too often in a row gets no further requests; when none is left, the whole batch of requests fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from trl.errors import EngineError
from trl.rollouts.connection import Server, Unreachable
from trl.rollouts.waits import SAY_EVERY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retries:
    """`most` is how often in a row a server may fail; `backoff` the seconds before the first retry, doubled for each further."""

    most: int = 5
    backoff: float = 1.0


T, A = TypeVar("T"), TypeVar("A")


class Dispatch(Generic[T, A]):
    """Answers every request by `ask(server, request)`, with up to `connections` threads per server."""

    def __init__(
        self,
        servers: Sequence[Server],
        ask: Callable[[Server, T], A],
        requests: Sequence[T],
        *,
        retries: Retries,
        connections: int,
    ) -> None:
        self.servers, self.ask, self.requests = servers, ask, requests
        self.retries, self.connections = retries, connections
        self.retried = 0
        self._answers: dict[int, A] = {}
        self._waiting = list(reversed(range(len(requests))))
        self._error: BaseException | None = None
        self._failures: dict[str, Unreachable] = {}
        self._changed = threading.Condition()

    def run(self) -> list[A]:
        """The answers, in the order of the requests. Raises EngineError if no server is left, or one refuses a request."""
        each = min(self.connections, -(-len(self.requests) // len(self.servers)))
        threads = [
            threading.Thread(target=self._serve, args=(server,), daemon=True)
            for server in self.servers
            for _ in range(each)
        ]
        for thread in threads:
            thread.start()
        self._wait(threads)
        if self._error is not None:
            raise self._error
        if len(self._answers) < len(self.requests):
            reasons = "\n".join(map(str, self._failures.values()))
            missing = len(self.requests) - len(self._answers)
            raise EngineError(
                f"{missing} of {len(self.requests)} requests have no answer, and all servers have failed:\n{reasons}"
            )
        return [self._answers[i] for i in range(len(self.requests))]

    def _wait(self, threads: Sequence[threading.Thread]) -> None:
        start = said = time.monotonic()
        while not self._is_over() and any(thread.is_alive() for thread in threads):
            with self._changed:
                self._changed.wait(0.2)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                urls = ", ".join(server.url for server in self.servers)
                done = f"{len(self._answers)} of {len(self.requests)} requests"
                logger.warning(f"After {said - start:.0f} s, {done} have been answered by {urls}.")

    def _is_over(self) -> bool:
        return self._error is not None or len(self._answers) == len(self.requests)

    def _serve(self, server: Server) -> None:
        failed = 0
        while failed <= self.retries.most and (number := self._next()) is not None:
            try:
                answer = self.ask(server, self.requests[number])
            except Unreachable as error:
                self._put_back(number, server, error)
                with self._changed:
                    self._changed.wait_for(self._is_over, timeout=self.retries.backoff * 2**failed)
                failed += 1
            except BaseException as error:  # re-raised by `run`
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
            else:
                failed = 0
                with self._changed:
                    self._answers[number] = answer
                    self._changed.notify_all()

    def _next(self) -> int | None:
        """The index of the next request to send; waits for one. None once the dispatch is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over())
            return None if self._is_over() else self._waiting.pop()

    def _put_back(self, number: int, server: Server, error: Unreachable) -> None:
        logger.warning("%s The request will be retried.", error)
        with self._changed:
            self.retried += 1
            self._failures[server.url] = error
            self._waiting.append(number)
            self._changed.notify_all()
