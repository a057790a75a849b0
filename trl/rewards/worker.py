"""Run a reward function in its own process, which can be killed at any time.

A thread cannot be stopped: C code that holds the interpreter's lock (a backtracking regular expression, a power of large
integers) blocks every thread of its process. The function is pickled with everything that it refers to. Its prints go to the
same terminal. Values that it logs are sent back with its result, and logged in the trainer's process.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import os
import pickle
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from trl.imports import is_available

START_SECONDS = 120
"""Seconds that a process may take to start and to import the function's modules."""
MOST_BYTES = 2**27
"""Most bytes of a pickled function: a larger one probably holds a model, and stays in the trainer's process."""
LOGS = ("log_metric", "log_extra")
DEATH_SIGNAL = 1


class WorkerError(Exception):
    """The function cannot be sent to another process, or its process did not start."""


class ProcessEnded(Exception):
    """The function ended its process."""


class RaisedInWorker(Exception):
    """Stands for an exception of the function, or a result, that cannot be pickled."""


@dataclass
class Worker:
    """A process that calls one function. It starts at the first call, and again after it was ended.

    Raises WorkerError if the function cannot run in another process.
    """

    function: Callable
    _payload: bytes = b""
    _process: subprocess.Popen | None = None
    _connection: Connection | None = None
    _logs: Mapping[str, Callable] = field(default_factory=dict)
    _stop: Callable | None = None

    def __post_init__(self) -> None:
        self._payload = packed(self.function)

    def send(self, keywords: Mapping[str, Any]) -> None:
        """Start a call of the function. `receive` has to follow."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._logs = {name: keywords[name] for name in LOGS if name in keywords}
        plain = {name: value for name, value in keywords.items() if name not in LOGS}
        self._connection.send_bytes(cloudpickle.dumps((plain, list(self._logs))))

    def receive(self, until: float) -> Any:
        """The function's result. Raises what the function raised, or TimeoutError once `time.monotonic()` reaches `until`."""
        kind, value, logged = self._answer(until)
        for name, arguments in logged:
            self._logs[name](*arguments)
        if kind == "raised":
            raise value
        return value

    def _answer(self, until: float) -> tuple[str, Any, list]:
        try:
            if not self._connection.poll(max(0.0, until - time.monotonic())):
                self.end()
                raise TimeoutError
            return pickle.loads(self._connection.recv_bytes())
        except KeyboardInterrupt:
            self.end()  # else a late result would be taken for that of the next call
            raise
        except (EOFError, ConnectionError) as error:
            status = self._process.wait()
            self.end()
            raise ProcessEnded(f"ended its process with status {status}") from error

    def _start(self) -> None:
        ours, theirs = Pipe()
        words = [sys.executable, "-c", "from trl.rewards.worker import main; main()", str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            words, pass_fds=[theirs.fileno()], env=environment, start_new_session=True, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = ours
        self._stop = weakref.finalize(self, _end, self._process, ours)
        ours.send_bytes(self._payload)
        try:
            kind, value, _ = self._answer(time.monotonic() + START_SECONDS)
        except (TimeoutError, ProcessEnded) as error:
            raise WorkerError("its process did not start") from error
        if kind == "raised":
            self.end()
            raise WorkerError(f"it cannot be loaded in another process ({type(value).__name__}: {value})")

    def end(self) -> None:
        """Kill the process; the next call starts a new one."""
        if self._process is not None:
            self._stop()
        self._process = None


def _end(process: subprocess.Popen, connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def packed(function: Callable) -> bytes:
    """Pickle a function.

    A function from the user's own module is pickled by value, so that the other process need not import the rest of the
    module; if that fails, and for functions of installed packages, the other process imports the module.
    """
    plain = getattr(function, "func", function)  # of a functools.partial
    name = getattr(plain, "__module__", None) or type(plain).__module__
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    is_own = file is not None and name != "__main__" and not Path(file).is_relative_to(sysconfig.get_path("purelib"))
    content = _by_value(function, module) if is_own and not name.startswith("trl.") else None
    try:
        content = content or cloudpickle.dumps(function)
    except Exception as error:  # objects that the function refers to may raise anything when they are pickled
        raise WorkerError(f"it cannot be sent ({type(error).__name__}: {error})") from error
    if len(content) > MOST_BYTES:
        raise WorkerError(f"the objects that it refers to take {len(content) / 2**20:.0f} MB")
    return content


def _by_value(function: Callable, module: ModuleType) -> bytes | None:
    """The function pickled with the parts of its module that it refers to; None if they cannot be pickled."""
    cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(function)
    except Exception:  # the module is imported there instead
        return None
    finally:
        cloudpickle.unregister_pickle_by_value(module)


# ---- in the other process ----


def main() -> None:
    """Serve calls until the trainer exits."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)  # be killed when the trainer dies
    connection = Connection(int(sys.argv[1]))
    try:
        function = pickle.loads(connection.recv_bytes())
        for name in getattr(function, "imports", ()):  # import them now, so that they do not count in the time limit
            is_available(name) and importlib.import_module(name)
    except BaseException as error:
        _reply(connection, "raised", error, [])
        return
    _reply(connection, "ready", None, [])
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        _serve(connection, function, request)


def _serve(connection: Connection, function: Callable, request: bytes) -> None:
    logged: list[tuple[str, tuple]] = []
    try:
        keywords, names = pickle.loads(request)
        logs = {name: lambda *given, name=name: logged.append((name, given)) for name in names}
        _reply(connection, "gave", called(function, {**keywords, **logs}), logged)
    except BaseException as error:  # SystemExit included: the caller decides
        _reply(connection, "raised", error, logged)


def called(function: Callable, keywords: Mapping[str, Any]) -> Any:
    """The result of a function, async or not."""
    result = function(**keywords)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _reply(connection: Connection, kind: str, value: Any, logged: list) -> None:
    if kind == "raised":
        value.add_note("".join(traceback.format_exception(value)))
    try:
        content = cloudpickle.dumps((kind, value, logged))
        pickle.loads(content)
    except Exception as error:
        told = f"{type(value).__name__}: {value}" if kind == "raised" else f"{type(error).__name__}: {error}"
        content = cloudpickle.dumps(("raised", RaisedInWorker(told), []))
    connection.send_bytes(content)
