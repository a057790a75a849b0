"""What runs a program that is not trusted: the strongest isolation that is there, found and tried out at the start.

A runner starts one of the scripts of `inside/` in a place of its own. Whether a program succeeded is never its own word:
its output is compared here, or the tests run in a second place and reach it by a wire that carries values alone.
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
    """Starts scripts where they can reach nothing but their pipes and a folder of their own."""

    name: str
    """What isolates, for the log."""
    isolates: bool
    """Whether it holds against a program that means harm."""

    def start(
        self, role: str, files: Mapping[str, bytes], limits: Limits, **pipes: Any
    ) -> AbstractContextManager[subprocess.Popen]:
        """`inside/start.py ROLE` as a process in a session of its own, in a folder that holds `files` and can be written.

        `pipes` are `stdin`, `stdout` and `stderr` of `subprocess.Popen`. When the context ends, so has the process with
        all that it started, and its folder is gone.
        """
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of a program. `passed` is the limit that it passed, "" if none; `verdict` that of its tests, if any."""

    status: int
    passed: str
    stdout: str
    stderr: str
    held: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether it came to its end by itself, with status 0."""
        return not self.passed and self.status == 0


def command(role: str, limits: Mapping[str, int], *, python: str = sys.executable, inside: Path = INSIDE) -> list[str]:
    """The words that start a script of `inside/`."""
    return [python, "-I", "-S", "-B", str(inside / "start.py"), role, json.dumps(limits)]


class SubprocessRunner:
    """A subprocess with limits. It isolates nothing but accidents: a program can read and change what its user can."""

    name = "a subprocess with limits, which isolates nothing but accidents"
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
    """Remove a folder whatever its shape: without permissions, or deeper than paths may be long."""
    for words in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
        subprocess.run(words, stderr=subprocess.DEVNULL, check=False)
    if os.path.exists(folder):
        logger.warning("What a program left in %s could not be removed.", folder)


def run_program(runner: CodeRunner, program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program as a script, with text as its standard input."""
    limits = limits or Limits()
    files = {"program.py": encoded(program)}
    with runner.start("program", files, limits, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        watch = Watch([process], limits, [process.stdout, process.stderr], (process.stdin, encoded(stdin)))
        passed = watch.run()
    stdout, stderr = (bytes(text[: limits.output]).decode(errors="replace") for text in watch.written.values())
    return Outcome(process.returncode, passed, stdout, stderr)


def run_tests(runner: CodeRunner, program: str, tests: str, *, limits: Limits | None = None) -> Outcome:
    """Run tests (Python statements, the names of which are the program's) against a program.

    The two run in two places. `held` says whether the tests came to their end and asserted something; the program has
    no part in that word. `stderr` is the program's, or why the tests failed.
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
    verdict = _verdict(report) if not passed else {"passed": False, "why": f"passed its limit on {passed}"}
    text = verdict["why"] if not stderr else f"{verdict['why']}\n{stderr.decode(errors='replace')}"
    return Outcome(served.returncode, passed, "", text, held=verdict["passed"] is True)


def _verdict(report: bytes) -> dict[str, Any]:
    try:
        return json.loads(report)
    except ValueError:  # ended by a limit, or by the tests themselves
        return {"passed": False, "why": "the tests ended without a result"}


def encoded(text: str) -> bytes:
    """UTF-8, with a question mark for what is no text."""
    return text.encode(errors="replace")
