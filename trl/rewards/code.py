"""Code execution as a reward: the share of tests that a completion's program passes.

Programs run in processes of their own, in an empty folder, with limits on time, memory, files and output, without the
environment's variables, network, child processes or installed packages. That holds off accidents, not an adversary: for code that may be
hostile, run training in a container.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trl.errors import ConfigError
from trl.rewards.answers import Completion, text_of

FENCE = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)

GUARD = """
import resource, sys
memory, seconds = {memory}, {seconds}
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
             "ctypes.", "pty.", "webbrowser.")
def guard(event, arguments):
    if event.startswith(FORBIDDEN):
        raise PermissionError(event + " is not allowed")
sys.addaudithook(guard)
program = sys.stdin.read()
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
"""


def code_of(text: str) -> str:
    """The last fenced block of a text, else all of it."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text


def passes(program: str, *, seconds: float, megabytes: int) -> bool:
    """Whether a Python program ends without an error."""
    guard = GUARD.format(memory=megabytes * 2**20, seconds=max(1, round(seconds + 0.5)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", guard],
                input=program.encode(),
                cwd=folder,
                env={},
                timeout=seconds,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


@dataclass(frozen=True)
class get_code_reward:
    """The share of the column `tests` (a list of Python statements each) that hold after the completion's program: 0 to 1.

    None where a row has no tests. Nothing is run unless `run_untrusted_code` is True.
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
        programs = [code_of(text_of(completion)) for completion in completions]
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(self._share, programs, tests))

    def _share(self, program: str, tests: Sequence[str]) -> float | None:
        if not tests:
            return None
        held = [passes(f"{program}\n{test}", seconds=self.seconds, megabytes=self.megabytes) for test in tests]
        return sum(held) / len(held)
