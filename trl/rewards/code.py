"""Code execution as a reward: the share of tests that a completion's program passes.

A program runs in a process of its own, in an empty folder, with limits on time, memory and files, without the environment's
variables, network, other processes or installed packages (`code_guard.py` says how). On Linux the kernel holds it to that;
for code that may be hostile, run training in a container all the same.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from trl.errors import ConfigError, DataError
from trl.rewards.answers import Completion, text_of

FENCE = re.compile(r"```(?:python3?|py)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)

GUARD = Path(__file__).with_name("code_guard.py")


def code_of(text: str) -> str:
    """The last fenced block of a text, else all of it."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text


def passes(program: str, *, seconds: float, megabytes: int) -> bool:
    """Whether a Python program comes to its end without an error, within `seconds` of time and `megabytes` of memory."""
    secret = secrets.token_hex()
    limits = [str(megabytes * 2**20), str(ceil(seconds) + 1)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as report:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", GUARD, folder, *limits],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                process.communicate(f"{secret}\n{program}".encode(errors="replace"), timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        report.seek(0)
        return report.read() == secret.encode()


@dataclass(frozen=True)
class get_code_reward:
    """The share of the column `tests` (a list of Python statements each) that hold after the completion's program: 0 to 1.

    Each test is a run of its own, of at most `seconds` and `megabytes`; so many `processes` run at a time. None where a
    row has no tests. Nothing is run unless `run_untrusted_code` is True.
    """

    run_untrusted_code: bool = False
    seconds: float = 5.0
    megabytes: int = 512
    processes: int = 4

    __name__ = "code_reward"

    def __post_init__(self) -> None:
        if not self.run_untrusted_code:
            raise ConfigError(
                "This reward runs programs that a model wrote, with limits but not in a sandbox. Set "
                "run_untrusted_code=True if that is wanted, best in a container."
            )

    def __call__(
        self, completions: Sequence[Completion], tests: Sequence[Sequence[str]], **_: Any
    ) -> list[float | None]:
        for sample, each in enumerate(tests):
            if isinstance(each, str):
                raise DataError(
                    f"Sample {sample}, column 'tests': expected a list of statements, found text {each!r:.60}."
                )
        programs = [code_of(text_of(completion)) for completion in completions]
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(self._share, programs, tests))

    def _share(self, program: str, tests: Sequence[str]) -> float | None:
        if not tests:
            return None
        held = [passes(f"{program}\n{test}", seconds=self.seconds, megabytes=self.megabytes) for test in tests]
        return sum(held) / len(held)
