"""Running reward functions: what each gave or raised, whatever it does meanwhile.

Functions may be async: those of one rollout batch run at the same time. With a timeout, a function runs in a process of its own
(`worker.py`), so that the limit holds for any code. Reward models and people stay in this process.
"""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from trl.rewards.reward import Reward, Samples
from trl.rewards.worker import WorkerError, called

Outcome = Sequence[float | None] | BaseException


def outcomes_of(rewards: Sequence[Reward], samples: Samples, timeout: float | None) -> list[Outcome]:
    """What each function gave, or raised; the async ones run at the same time."""
    found: dict[int, Outcome] = {}
    waiting = [i for i, reward in enumerate(rewards) if reward.is_async]
    if waiting:
        asynchronous = [rewards[i] for i in waiting]
        run = _all_async if timeout is None else functools.partial(_all_begun, timeout=timeout)
        found.update(zip(waiting, run(asynchronous, samples), strict=True))
    for i, reward in enumerate(rewards):
        if i not in found:
            (found[i],) = _all_begun([reward], samples, timeout)
    return [found[i] for i in range(len(rewards))]


def begin(reward: Reward, samples: Samples, timeout: float | None) -> Callable[[], Any]:
    """Let the function begin, in a process of its own where there is a time limit; what waits for its result."""
    keywords = reward.keywords(samples)
    if timeout is None:
        return lambda: reward.function(**keywords)
    if reward.worker is not None:
        try:
            reward.worker.send(keywords)
            return functools.partial(reward.worker.receive, time.monotonic() + timeout)
        except WorkerError as error:
            reward.stay(error)
    return lambda: _in_thread(lambda: called(reward.function, keywords), timeout)


def _caught(function: Callable[[], Any]) -> Outcome:
    """What a user's function gives or raises, SystemExit included; a signal that ends the program is none of its doing."""
    try:
        with _signals_known():
            return function()
    except BaseException as error:
        if _is_from_signal(error):
            raise
        return error


@contextmanager
def _signals_known() -> Iterator[None]:
    """Ctrl-C raises from a function of ours meanwhile, to be told from a function that raises KeyboardInterrupt itself."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _is_from_signal(error: BaseException) -> bool:
    """Whether a handler of signals raised it."""
    if isinstance(error, Exception):
        return False
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(h, "__func__", h), "__code__", None) for h in [*handlers, _interrupt]} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _all_begun(rewards: Sequence[Reward], samples: Samples, timeout: float | None) -> list[Outcome]:
    """What functions give that all begin before one is waited for."""
    begun = [_caught(lambda reward=reward: begin(reward, samples, timeout)) for reward in rewards]
    return [wait if isinstance(wait, BaseException) else _caught(wait) for wait in begun]


def _in_thread(function: Callable[[], Any], timeout: float | None) -> Any:
    """The result of a function that may take `timeout` seconds. Beyond, its thread is abandoned."""
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((function(), None))
        except BaseException as error:  # handed to the thread that waits
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not done:
        raise TimeoutError
    result, error = done[0]
    if error is not None:
        raise error
    return result


def _all_async(rewards: Sequence[Reward], samples: Samples) -> list[Outcome]:
    """In a thread of its own, since a notebook has a loop running already."""

    async def call(reward: Reward) -> Outcome:
        try:
            return await reward.function(**reward.keywords(samples))
        except BaseException as error:  # SystemExit would end the loop, and the others with it
            return error

    async def run() -> list[Outcome]:
        return await asyncio.gather(*map(call, rewards))

    return _in_thread(lambda: asyncio.run(run()), None)
