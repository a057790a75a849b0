"""Python programs that begin with the libraries imported: each is forked from a process that has done so.

    FAST_PYTHON -m torch.distributed.run --nproc-per-node 2 program.py     as `python …`, and some seconds of work sooner

`fast_python()` gives FAST_PYTHON: a command that looks to whoever starts it like the interpreter. It hands arguments, environment,
working folder and standard streams to the server, which forks; it passes signals on, and ends as the program did. The server ends with
the process that asked for it, and a program with its command.

What is read from the environment while libraries are imported (a GPU, HF_HOME) is as it was when the server began.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

PRELOADED = ("tests.stops.runs", "trl.cli.main", "trl.cli.train", "accelerate.commands.launch", "torch.distributed.run")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
POLL = 0.02
"""Seconds between looks at which programs have ended."""


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

    def __init__(self, address: str) -> None:
        import selectors

        self.programs: dict[int, socket.socket] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(0, selectors.EVENT_READ)  # closed by the end of the process that asked for the server

    def serve(self) -> dict | None:
        """Serve until the owner ends. Returns in every program as well, there with what is to be run."""
        while True:
            for key, _ in self.selector.select(POLL if self.programs else None):
                if key.fd == 0:
                    return self._stop()
                if key.fileobj is not self.listener:
                    self._left(key.fileobj)
                elif request := self._fork():
                    return request
            self._report()

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


def serve(address: str) -> None:
    """Import, and serve."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    if request := Server(address).serve():
        run(request)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        be_the_program(sys.argv[1], sys.argv[2:])
