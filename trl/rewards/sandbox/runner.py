"""Runners of untrusted programs.

A runner starts one of the scripts of `inside/` in a sandbox. A program cannot report its own success: its output is compared in
this process, or its tests run in a second sandbox, which is connected to the program's by pipes that carry only values.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trl.rewards.sandbox.watch import Limits, Watch

logger = logging.getLogger(__name__)

INSIDE = Path(__file__).with_name("inside")
PIPE = subprocess.PIPE


class CodeRunner(Protocol):
    """Starts scripts in a sandbox, where they have access only to their pipes and to a folder of their own."""

    name: str
    """Description of the isolation, for the log."""
    isolates: bool
    """Whether it withstands malicious programs."""

    def start(
        self, role: str, files: Mapping[str, bytes], limits: Limits, **pipes: Any
    ) -> AbstractContextManager[subprocess.Popen]:
        """Start `inside/start.py ROLE` as a process in a new session, in a writable folder with `files`.

        `pipes` are `stdin`, `stdout` and `stderr` of `subprocess.Popen`. When the context ends, the process and all processes
        that it started have ended, and its folder has been removed.
        """
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a program. `passed` is the limit that it exceeded, "" if none; `held` whether its tests passed, if any."""

    status: int
    passed: str
    stdout: str
    stderr: str
    held: bool = False

    @property
    def succeeded(self) -> bool:
        """True if it ended by itself, with status 0."""
        return not self.passed and self.status == 0


def command(role: str, limits: Mapping[str, int], *, python: str = sys.executable, inside: Path = INSIDE) -> list[str]:
    """The command line that starts a script of `inside/`."""
    return [python, "-I", "-S", "-B", str(inside / "start.py"), role, json.dumps(limits)]


class SubprocessRunner:
    """A subprocess with limits. It protects only against accidents: a program can read and change what its user can."""

    name = "a subprocess with limits, which protects only against accidents"
    isolates = False

    @contextmanager
    def start(self, role: str, files: Mapping[str, bytes], limits: Limits, **pipes: Any) -> Iterator[subprocess.Popen]:
        folder = tempfile.mkdtemp(prefix="trl-program-")
        try:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            arguments = command(role, limits.resources())
            with subprocess.Popen(arguments, cwd=folder, env={}, start_new_session=True, **pipes) as process:
                yield process
        finally:
            remove(folder)


def remove(folder: str) -> None:
    """Remove a folder, even without permissions in it, or deeper than the longest path."""
    for words in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
        subprocess.run(words, stderr=subprocess.DEVNULL, check=False)
    if os.path.exists(folder):
        logger.warning("The folder %s of a program could not be removed.", folder)


def run_program(runner: CodeRunner, program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program as a script, with `stdin` as the text of its standard input."""
    limits = limits or Limits()
    files = {"program.py": encoded(program)}
    with runner.start("program", files, limits, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        watch = Watch([process], limits, [process.stdout, process.stderr], (process.stdin, encoded(stdin)))
        passed = watch.run()
    stdout, stderr = (bytes(text[: limits.output]).decode(errors="replace") for text in watch.written.values())
    return Outcome(process.returncode, passed, stdout, stderr)


def run_tests(runner: CodeRunner, program: str, tests: str, *, limits: Limits | None = None) -> Outcome:
    """Run tests (Python statements that use names of the program) against a program.

    The two run in separate sandboxes. `held` is true if the tests ran to their end and asserted something; the program cannot
    influence that report. `stderr` has the reason why the tests failed, and the program's standard error.
    """
    limits = limits or Limits()
    theirs, ours = {"program.py": encoded(program)}, {"tests.py": encoded(tests)}
    with runner.start("serve", theirs, limits, stdin=PIPE, stdout=PIPE, stderr=PIPE) as served:
        pipes = {"stdin": served.stdout, "stdout": served.stdin, "stderr": PIPE}
        with runner.start("tests", ours, limits, **pipes) as tester:
            served.stdin.close()
            served.stdout.close()
            watch = Watch([tester, served], limits, [tester.stderr, served.stderr])
            passed = watch.run()
    report, stderr = (bytes(text[: limits.output]) for text in watch.written.values())
    verdict = _verdict(report) if not passed else {"passed": False, "why": f"exceeded its limit on {passed}"}
    text = verdict["why"] if not stderr else f"{verdict['why']}\n{stderr.decode(errors='replace')}"
    return Outcome(served.returncode, passed, "", text, held=verdict["passed"] is True)


def _verdict(report: bytes) -> dict[str, Any]:
    try:
        return json.loads(report)
    except ValueError:  # ended by a limit, or by the tests themselves
        return {"passed": False, "why": "the tests ended without a result"}


def encoded(text: str) -> bytes:
    """The text as UTF-8, with question marks for characters that cannot be encoded."""
    return text.encode(errors="replace")
