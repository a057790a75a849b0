"""Run reward functions, and collect what each of them returned or raised.

Functions may be async; those run concurrently. With a timeout, a function runs in its own process (`worker.py`), so that the
limit holds for any code. Reward models and human raters stay in this process.
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
    """What each function returned or raised; async functions run concurrently."""
    found: dict[int, Outcome] = {}
    waiting = [i for i, reward in enumerate(rewards) if reward.is_async]
    if waiting:
        asynchronous = [rewards[i] for i in waiting]
        run = _all_async if timeout is None else functools.partial(_all_started, timeout=timeout)
        found.update(zip(waiting, run(asynchronous, samples), strict=True))
    for i, reward in enumerate(rewards):
        if i not in found:
            (found[i],) = _all_started([reward], samples, timeout)
    return [found[i] for i in range(len(rewards))]


def begin(reward: Reward, samples: Samples, timeout: float | None) -> Callable[[], Any]:
    """Start the function, in its own process if there is a time limit; returns a function that waits for the result."""
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
    """What a user's function returns or raises, SystemExit included. Exceptions from signal handlers are not caught."""
    try:
        with _signals_known():
            return function()
    except BaseException as error:
        if _is_from_signal(error):
            raise
        return error


@contextmanager
def _signals_known() -> Iterator[None]:
    """Within it, Ctrl-C raises KeyboardInterrupt from `_interrupt`, to distinguish it from one that a reward function raises."""
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
    """True if a signal handler raised this exception."""
    if isinstance(error, Exception):
        return False
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(h, "__func__", h), "__code__", None) for h in [*handlers, _interrupt]} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _all_started(rewards: Sequence[Reward], samples: Samples, timeout: float | None) -> list[Outcome]:
    """The outcomes of functions that are all started before the first is waited for."""
    begun = [_caught(lambda reward=reward: begin(reward, samples, timeout)) for reward in rewards]
    return [wait if isinstance(wait, BaseException) else _caught(wait) for wait in begun]


def _in_thread(function: Callable[[], Any], timeout: float | None) -> Any:
    """The result of a function, run in a thread. Raises TimeoutError after `timeout` seconds, and abandons the thread."""
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((function(), None))
        except BaseException as error:  # re-raised in the waiting thread
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
    """Run async functions concurrently, in another thread, since a notebook already runs an event loop in this one."""

    async def call(reward: Reward) -> Outcome:
        try:
            return await reward.function(**reward.keywords(samples))
        except BaseException as error:  # SystemExit would end the event loop, and with it the other functions
            return error

    async def run() -> list[Outcome]:
        return await asyncio.gather(*map(call, rewards))

    return _in_thread(lambda: asyncio.run(run()), None)
