"""Programs that a model wrote: what they may not do, and that none of it counts as success."""

from __future__ import annotations

import os
import socket
import sys
import time

import pytest

from trl.errors import ConfigError, DataError
from trl.rewards import get_code_reward
from trl.rewards.code import code_of, passes

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limits are Linux's")


def runs(program: str, seconds: float = 5.0, megabytes: int = 512) -> bool:
    return passes(program, seconds=seconds, megabytes=megabytes)


def test_it_has_to_be_asked_for():
    with pytest.raises(ConfigError, match="Set run_untrusted_code=True"):
        get_code_reward()


def test_the_share_of_tests_that_hold():
    reward = get_code_reward(run_untrusted_code=True, seconds=5.0, processes=2)
    right = "Here:\n```python\ndef double(x):\n    return 2 * x\n```"
    tests = ["assert double(2) == 4", "assert double(0) == 0"]
    given = {"completions": [right, "def double(x): return 0", right], "tests": [tests, tests, []]}
    assert reward(**given) == [1.0, 0.5, None]


def test_the_last_block_is_the_program():
    assert code_of("```py\na = 1\n```\nor\n```\nb = 2\n```") == "b = 2\n"
    assert code_of("```Python3\nc = 3\n```") == "c = 3\n"
    assert code_of("a = 1") == "a = 1"


def test_tests_that_are_one_text():
    with pytest.raises(
        DataError, match="Sample 1, column 'tests': expected a list of statements, found text 'assert x'"
    ):
        get_code_reward(run_untrusted_code=True)(completions=["x = 1"] * 2, tests=[["assert x"], "assert x"])


@pytest.mark.parametrize(
    "program",
    [
        "print('é')",
        "import json, math",
        "open('own.txt', 'w').write('1')",
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A and __name__ == '__main__'",
    ],
)
def test_what_is_allowed(program):
    assert runs(program)


@linux
def test_threads_are_allowed():
    assert runs("import threading; t = threading.Thread(target=print); t.start(); t.join()")


@pytest.mark.parametrize(
    "program",
    ["raise SystemExit(0)", "import os; os._exit(0)", "1 / 0", "def f(:", "assert False", "exit()", "\ud800 = 1"],
)
def test_leaving_early_is_no_success(program):
    assert not runs(program)


def test_time_is_limited():
    start = time.monotonic()
    assert not runs("while True: pass", seconds=0.5)
    assert not runs("import time; time.sleep(60)", seconds=0.5)
    assert not runs("try:\n    import time; time.sleep(60)\nexcept BaseException: pass", seconds=0.5)
    assert time.monotonic() - start < 50, "on a machine that has other things to do, too"


def test_memory_is_limited():
    assert not runs("x = 'a' * 10**9", megabytes=256)
    assert not runs("x = []\nwhile True: x.append(bytearray(10**6))", megabytes=256)
    assert runs("x = 'a' * 10**6", megabytes=256)


def test_files_are_limited(tmp_path):
    assert not runs("open('big', 'w').write('x' * 10**8)")
    assert not runs(f"open({str(tmp_path / 'mine')!r}, 'w').write('1')")
    kept = tmp_path / "kept"
    kept.write_text("1")
    assert not runs(f"import os; os.remove({str(kept)!r})")
    assert kept.read_text() == "1"
    assert not list(tmp_path.glob("mine"))


@linux
def test_the_kernel_refuses_where_python_is_not_asked(tmp_path):
    """Past the hook: the C library's calls, by the module that `subprocess` is made of, and an inherited folder."""
    fork_exec = f"""
import _posixsubprocess, os
read, write = os.pipe()
_posixsubprocess.fork_exec([b"touch", b"{tmp_path}/made"], [b"/bin/touch"], True, (write,), None, None,
    -1, -1, -1, -1, -1, -1, read, write, False, False, -1, None, None, None, -1, None, False)
"""
    assert not runs(fork_exec)
    assert not runs("import os\nwhile True: os.fork()", seconds=1.0)
    link = f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/mine', 'w').write('1')"
    assert not runs(link)
    assert not list(tmp_path.iterdir())


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not runs(f"import socket; socket.create_connection(('127.0.0.1', {port}))")
        assert not runs(f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')", seconds=2.0)
    assert not runs("import _socket; _socket.socket()")


def test_the_environment_and_its_process_stay_out_of_reach(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TEST", "1")
    assert runs("import os; assert 'SECRET_OF_THE_TEST' not in os.environ")
    assert not runs(f"import os; os.kill({os.getpid()}, 0)")
    assert not runs("import ctypes; ctypes.CDLL(None)")
    assert not runs("import torch")
