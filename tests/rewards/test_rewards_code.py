"""Programs that a model wrote as a reward: which tests there are, and that none of them is empty."""

from __future__ import annotations

import pytest

from trl.errors import ConfigError, DataError
from trl.rewards import get_code_reward
from trl.rewards.code import check_test, code_of, holds
from trl.rewards.sandbox import Limits, SubprocessRunner, run_program

AMPLE = Limits(seconds=60)


class Recorder(SubprocessRunner):
    """Counts what it starts."""

    def __init__(self):
        self.started = []

    def start(self, role, files, limits, **pipes):
        self.started.append(role)
        return super().start(role, files, limits, **pipes)


def passes(program: str, test) -> bool:
    return holds(SubprocessRunner(), program, test, AMPLE)


def test_it_has_to_be_asked_for():
    with pytest.raises(ConfigError, match="Set run_untrusted_code=True"):
        get_code_reward()
    with pytest.raises(ConfigError, match="seconds=-1: give more than 0"):
        get_code_reward(run_untrusted_code=True, seconds=-1, runner=SubprocessRunner())


def test_the_share_of_tests_that_hold():
    runner = Recorder()
    reward = get_code_reward(run_untrusted_code=True, seconds=60.0, processes=2, runner=runner)
    right = "Here:\n```python\ndef double(x):\n    return 2 * x\n```"
    tests = ["assert double(2) == 4", "assert double(0) == 0"]
    given = {"completions": [right, "def double(x): return 0", right], "tests": [tests, tests, []]}
    assert reward(**given) == [1.0, 0.5, None]
    assert sorted(runner.started) == ["serve"] * 4 + ["tests"] * 4


def test_the_last_block_is_the_program():
    assert code_of("```py\na = 1\n```\nor\n```\nb = 2\n```") == "b = 2\n"
    assert code_of("```Python3\nc = 3\n```") == "c = 3\n"
    assert code_of("```python\nd = 4\n```\nIt prints:\n```text\n4\n```") == "d = 4\n"
    assert code_of("a = 1") == "a = 1"
    assert code_of("```py\nnot closed") == "```py\nnot closed"


def test_programs_that_read_and_write():
    double = "print(2 * int(input()))"
    assert passes(double, {"input": "2\n", "output": "4"})
    assert passes(double, {"input": "2", "output": "4\n\n"})
    assert not passes(double, {"input": "2", "output": "5"})
    assert not passes(double + "\nraise SystemExit(1)", {"input": "2", "output": "4"})
    assert passes("print('a ')\nprint()", {"output": "a", "call": None, "input": None})
    assert passes("import sys; print(len(sys.stdin.read()))", {"input": "x" * 10**6, "output": "1000000"})


def test_functions_that_are_called():
    program = "class Solution:\n    def twice(self, x, *, more=0): return [x, x + more]\ndef twice(x): return (x, x)"
    assert passes(program, {"call": "twice", "args": [2], "output": (2, 2)})
    assert not passes(program, {"call": "twice", "args": [2], "output": [2, 2]})
    assert passes("def none(): pass", {"call": "none", "args": None, "kwargs": None, "output": None})
    assert passes("import math", {"call": "math.gcd", "args": [4, 6], "output": 2})
    assert not passes(program, {"call": "missing", "args": [2], "output": 4})


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("double(2) == 4", "asserts nothing, so every program would pass it"),
        ("assert True", "asserts nothing"),
        ("assert (double(2) == 4, 'wrong')", "asserts nothing"),
        ("", "asserts nothing"),
        ("assert double(2) ==", "is not valid Python: invalid syntax"),
        ("assert x\0", "is not valid Python"),
        ("assert " + "(" * 1000 + "x", "is not valid Python"),
        ({"input": "1"}, "a test needs 'output'"),
        ({"input": 1, "output": "1"}, "'input' and 'output' have to be text"),
        ({"input": "1", "output": 1}, "'input' and 'output' have to be text"),
        ({"call": "f(", "output": 1}, r"'call' has to name a function, but is 'f\('"),
        ({"call": "__import__('os').system", "output": 0}, "'call' has to name a function"),
        ({"call": 3, "output": 0}, "'call' has to name a function"),
        (3, "a test has to be text or a dict, but this is a int"),
    ],
)
def test_tests_that_say_nothing(test, words):
    with pytest.raises(DataError, match=f"Sample 2, column 'tests': .*{words}"):
        get_code_reward(run_untrusted_code=True, runner=SubprocessRunner())(
            completions=["x = 1"] * 2, tests=[["assert x"], [test]]
        )


@pytest.mark.parametrize(
    "test", ["assert f(1) == 2", "if f(1) != 2: raise ValueError", "def test_f():\n    assert f(1)"]
)
def test_tests_that_say_something(test):
    check_test(test, "here")


def test_tests_that_are_one_text():
    with pytest.raises(
        DataError, match="Sample 2, column 'tests': expected a list of statements, found text 'assert x'"
    ):
        get_code_reward(run_untrusted_code=True, runner=SubprocessRunner())(
            completions=["x = 1"] * 2, tests=[["assert x"], "assert x"]
        )


@pytest.mark.parametrize(
    "program",
    [
        "print('é')",
        "import json, math",
        "open('own.txt', 'w').write('1')",
        "import tempfile; tempfile.TemporaryFile().write(b'1')",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A and __name__ == '__main__'",
    ],
)
def test_what_is_allowed(program):
    outcome = run_program(SubprocessRunner(), program, limits=AMPLE)
    assert outcome.succeeded, outcome.stderr


def test_what_a_program_wrote():
    outcome = run_program(SubprocessRunner(), "import sys; print('é'); sys.exit('no')", limits=AMPLE)
    assert (outcome.status, outcome.stdout, outcome.stderr) == (1, "é\n", "no\n")


@pytest.mark.parametrize("program", ["1 / 0", "def f(:", "assert False", "\ud800 = 1"])
def test_programs_that_fail(program):
    assert not passes(program, "assert 1 < 2 and print is not None and len(str(x)) == 1")
    assert not run_program(SubprocessRunner(), program, limits=AMPLE).succeeded


def test_the_environment_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "1")
    program = "import os; assert 'SECRET_OF_THE_TEST' not in os.environ"
    assert run_program(SubprocessRunner(), program, limits=AMPLE).succeeded
