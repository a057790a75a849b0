"""Code execution as a reward: the share of tests that a completion's program passes.

A program runs with the best isolation that `trl.rewards.sandbox` finds, and with limits on time, memory, processes, files and
output that are enforced from outside. The program cannot report its own success: its output is compared in this process, or
the tests run in a separate place that it cannot reach. docs/security.md says which attacks this stops.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from trl.errors import ConfigError, DataError
from trl.rewards.answers import Completion, text_of
from trl.rewards.sandbox import CodeRunner, Limits, find_runner, run_program, run_tests

FENCE = "```"
LANGUAGES = ("", "py", "python", "python3")

Test = str | Mapping[str, Any]


def code_of(text: str) -> str:
    """The last fenced block of Python in a text; without one, the whole text."""
    pieces = text.split(FENCE)
    for block in reversed(pieces[1:-1:2]):
        language, line_end, code = block.partition("\n")
        if line_end and language.strip().lower() in LANGUAGES:
            return code
    return text


def holds(runner: CodeRunner, program: str, test: Test, limits: Limits) -> bool:
    """True if a program passes one test: statements with assertions, or `input` and `output`, or `call` and `output`."""
    if isinstance(test, str):
        return run_tests(runner, program, test, limits=limits).held
    if test.get("call") is not None:
        return run_tests(runner, program, _call(test), limits=limits).held
    outcome = run_program(runner, program, stdin=test.get("input") or "", limits=limits)
    return outcome.succeeded and _lines(outcome.stdout) == _lines(test["output"])


def _call(test: Mapping[str, Any]) -> str:
    arguments, keywords = list(test.get("args") or ()), dict(test.get("kwargs") or {})
    return f"assert {test['call']}(*{arguments!r}, **{keywords!r}) == {test['output']!r}"


def _lines(text: str) -> list[str]:
    """The lines without trailing spaces, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def check_test(test: Test, where: str) -> None:
    """Raise DataError for a test that every program would pass, and for a value that is not a test."""
    if isinstance(test, Mapping):
        _check_fields(test, where)
    elif not isinstance(test, str):
        raise DataError(f"{where}: a test has to be text or a dict, but this is a {type(test).__name__}.")
    elif not _asserts(test, where):
        raise DataError(
            f"{where}: {test!r:.80} asserts nothing, so every program would pass it. Write `assert …` with a condition."
        )


def _check_fields(test: Mapping[str, Any], where: str) -> None:
    call, output = test.get("call"), test.get("output")
    if call is not None and (not isinstance(call, str) or not all(map(str.isidentifier, call.split(".")))):
        raise DataError(f"{where}: 'call' has to name a function, but is {call!r:.60}.")
    if output is None and ("output" not in test or call is None):
        raise DataError(f"{where}: a test needs 'output', the expected result, with 'input' or with 'call' and 'args'.")
    if call is None and not (isinstance(output, str) and isinstance(test.get("input") or "", str)):
        raise DataError(f"{where}: 'input' and 'output' have to be text, for standard input and output.")


def _asserts(test: str, where: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(test)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{where}: {test!r:.80} is not valid Python: {error}.") from error
    conditions = [node.test for node in nodes if isinstance(node, ast.Assert)]
    raised = any(isinstance(node, ast.Raise) for node in nodes)
    return raised or any(not isinstance(condition, ast.Constant | ast.Tuple) for condition in conditions)


@dataclass(frozen=True)
class get_code_reward:
    """The share of tests in the column `tests` that a completion's program passes: 0 to 1; None if a row has no tests.

    A test is Python with assertions ("assert double(2) == 4"), or `{"input": …, "output": …}` for a program that reads
    standard input, or `{"call": "double", "args": [2], "output": 4}`. Each test is a separate run, limited to `seconds` and
    `megabytes`; up to `processes` run concurrently. Nothing runs unless `run_untrusted_code` is True, and nothing runs
    without isolation unless `without_isolation` is True as well. `runner` replaces the isolation that is chosen by default.
    """

    run_untrusted_code: bool = False
    seconds: float = 5.0
    megabytes: int = 512
    processes: int = 4
    without_isolation: bool = False
    runner: CodeRunner | None = None

    __name__ = "code_reward"

    def __post_init__(self) -> None:
        if not self.run_untrusted_code:
            raise ConfigError(
                "This reward runs programs that a model wrote. Set run_untrusted_code=True to allow this; they are isolated as "
                "described in docs/security.md."
            )
        for name in ("seconds", "megabytes", "processes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give more than 0.")
        _ = self._runner

    @property
    def _runner(self) -> CodeRunner:
        return self.runner or find_runner(without_isolation=self.without_isolation)

    def __call__(
        self, completions: Sequence[Completion], tests: Sequence[Sequence[Test]], **_: Any
    ) -> list[float | None]:
        for sample, each in enumerate(tests):
            where = f"Sample {sample + 1}, column 'tests'"
            if isinstance(each, str):
                raise DataError(f"{where}: expected a list of statements, found text {each!r:.60}.")
            for test in each:
                check_test(test, where)
        programs = [code_of(text_of(completion)) for completion in completions]
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(self._share, programs, tests))

    def _share(self, program: str, tests: Sequence[Test]) -> float | None:
        if not tests:
            return None
        limits = Limits(seconds=self.seconds, megabytes=self.megabytes)
        return sum(holds(self._runner, program, test, limits) for test in tests) / len(tests)
