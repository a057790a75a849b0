"""Python programs that begin with the libraries imported: each is forked from a process that has done so.

    FAST_PYTHON -m torch.distributed.run --nproc-per-node 2 program.py     as `python …`, and some seconds of work sooner

`fast_python()` gives FAST_PYTHON: a command that looks to whoever starts it like the interpreter. It hands arguments,
environment, working folder and standard streams to the server, which forks; it passes signals on, and ends as the
program did. The processes of a test session share a server, which ends with the session, and a program ends with its
command.

What is read from the environment while libraries are imported (a GPU, HF_HOME) is as it was when the server began. A program ends
without the last of what an interpreter does, which is to take apart what was imported and costs seconds; with
TRL_TEST_WHOLE_END in its environment it does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from typing import NoReturn

PRELOADED = (
    "tests.stops.runs",
    "trl.cli.main",
    "trl.cli.train",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
SESSION = "TRL_TEST_SESSION"
"""The variable with the number of the process whose end is that of the session, and the folder of its server."""
WHOLE_END = "TRL_TEST_WHOLE_END"
POLL = 0.02
"""Seconds between looks at which programs have ended."""


def begin_session() -> None:
    """Make this process the one with which the server ends; workers of pytest have it from theirs."""
    if SESSION not in os.environ:
        folder = tempfile.mkdtemp(prefix="trl-tests-")
        os.environ[SESSION] = f"{os.getpid()} {folder}"
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


# ---- the command: imports as little as it can ----


def be_the_program(address: str, words: list[str]) -> None:
    """Have the server run `python *words`, and end with its status."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = json.dumps({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    process = int.from_bytes(_received(server, 8), "big")
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(process, number))
    status = int.from_bytes(_received(server, 8), "big")
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _received(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = connection.recv(size - len(found))
        if not more:
            raise SystemExit("tests.forked: the other side has ended")
        found += more
    return found


# ---- the server ----


class Server:
    """Forks a program for each connection, says its number there, and how it ended."""

    def __init__(self, address: str, session: int) -> None:
        import selectors

        self.session = session
        self.programs: dict[int, socket.socket] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def serve(self) -> dict | None:
        """Serve until the session ends. Returns in every program as well, there with what is to be run."""
        while is_running(self.session):
            for key, _ in self.selector.select(POLL if self.programs else 1.0):
                if key.fileobj is not self.listener:
                    self._left(key.fileobj)
                elif request := self._fork():
                    return request
            self._report()
        return self._stop()

    def _fork(self) -> dict | None:
        connection = self.listener.accept()[0]
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        request = json.loads(_received(connection, int.from_bytes(size, "big")))
        process = os.fork()
        if not process:
            for stream, number in zip(streams, (0, 1, 2), strict=True):
                os.dup2(stream, number)
            for each in (self.listener, connection, *self.programs.values()):
                each.close()
            self.selector.close()
        for stream in streams:
            os.close(stream)
        if not process:
            return request
        connection.sendall(process.to_bytes(8, "big"))
        self.programs[process] = connection
        self.selector.register(connection, 1)
        return None

    def _left(self, connection: socket.socket) -> None:
        """The command was killed, and its program with it."""
        for process, known in list(self.programs.items()):
            if known is connection:
                os.kill(process, signal.SIGKILL)
                self._forget(process)

    def _forget(self, process: int) -> None:
        connection = self.programs.pop(process)
        self.selector.unregister(connection)
        connection.close()

    def _report(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                process, status = found
                if process in self.programs:
                    with contextlib.suppress(OSError):
                        self.programs[process].sendall(status.to_bytes(8, "big"))
                    self._forget(process)

    def _stop(self) -> None:
        for process in self.programs:
            os.kill(process, signal.SIGKILL)


def is_running(process: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def run_to_its_end(request: dict) -> NoReturn:
    """Be `python *words`, and end as an interpreter does: with what is registered for the end, and with the same status."""
    status, interrupted = 0, False
    try:
        run(request)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if status and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = 120
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def run(request: dict) -> None:
    """Be `python *words`."""
    import runpy
    import types
    import warnings
    from pathlib import Path

    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.orig_argv = [sys.executable, *request["words"]]
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(
        1, "w", 1 if os.isatty(1) or "-u" in request["words"] else -1, closefd=False
    )
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    first, *words = [word for word in request["words"] if word != "-u"]
    sys.path[0] = os.path.dirname(os.path.abspath(first)) if first not in ("-m", "-c") else request["folder"]
    if first == "-m":
        name, *words = words
        sys.argv = [name, *words]
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    code, name = (words.pop(0), "<string>") if first == "-c" else (Path(first).read_text(), first)
    sys.argv = [first, *words]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = name
    exec(compile(code, name, "exec"), vars(module))


def serve(address: str, session: int) -> None:
    """Import, and serve while that process runs: behind a process that ends at once, so that nobody has to wait for it."""
    import importlib

    if os.fork():
        os._exit(0)
    for name in PRELOADED:
        importlib.import_module(name)
    # torchrun names events by it, and it reads the sources of the whole stack, among thousands of modules: seconds for
    # each start.
    sys.modules["torch.distributed.elastic.rendezvous.dynamic_rendezvous"].get_method_name = lambda depth=2: "unnamed"
    request = Server(address, session).serve()
    if request and WHOLE_END in request["environment"]:
        run(request)
    elif request:
        run_to_its_end(request)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        be_the_program(sys.argv[1], sys.argv[2:])
