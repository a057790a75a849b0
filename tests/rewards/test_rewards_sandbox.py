"""Programs that mean harm: what they try under bubblewrap, and that the process which runs them is as it was."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from trl.errors import ConfigError
from trl.rewards import get_code_reward
from trl.rewards.sandbox import Limits, SubprocessRunner, choice, find_runner, run_program, run_tests
from trl.rewards.sandbox.bubblewrap import BubblewrapRunner
from trl.rewards.sandbox.choice import try_out
from trl.rewards.sandbox.runner import remove


@functools.cache
def is_isolated() -> bool:
    return sys.platform == "linux" and not try_out(BubblewrapRunner())


isolated = pytest.mark.skipif("not is_isolated()", reason="bubblewrap does not work here")
AMPLE = Limits(seconds=60)
SHORT = Limits(seconds=1.5, megabytes=256)
SHORTER = Limits(seconds=0.8, megabytes=256)
"""Of programs that nothing but time ends."""

SYSCALL = "import ctypes; call = ctypes.CDLL(None, use_errno=True).syscall\n"

# Each prints `escaped` if it gets what it wants. {pid}, {file}, {folder} and {port} are the trainer's own.
ESCAPES = {
    "signal the trainer": "import os; os.kill({pid}, 10)",
    "signal its group": "import os; os.killpg({group}, 10)",
    "signal by descriptor": "import os, signal; signal.pidfd_send_signal(os.pidfd_open({pid}), 10)",
    "signal all": "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(-1, 15); 1 / 0",
    "stop the parent": "import os; assert os.getppid() > 1; os.kill(os.getppid(), 19)",
    "renice the trainer": "import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "renice everyone of the user": "import os; os.setpriority(os.PRIO_USER, {user}, 19); 1 / 0",
    "reschedule the trainer": "import os; os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    "pin the trainer to one CPU": "import os; os.sched_setaffinity({pid}, [0])",
    "limit the trainer": "import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE, (9, 9))",
    "limit the trainer's memory": "import resource; resource.prlimit({pid}, resource.RLIMIT_AS, (2**27, 2**27))",
    "trace the trainer": SYSCALL + "assert call(101, 16, {pid}, 0, 0) == 0",
    "read the trainer's memory": "open('/proc/{pid}/mem', 'rb')",
    "read the trainer's environment": "assert b'PATH' in open('/proc/{pid}/environ', 'rb').read()",
    "pass files over the trainer's descriptors": "open('/proc/{pid}/fd/2', 'w').write('x')",
    "read a file": "open('{file}').read()",
    "list a folder": "import os; os.listdir('{folder}')",
    "write a file": "open('{file}', 'w')",
    "remove a file": "import os; os.remove('{file}')",
    "follow a link": "import os; os.symlink('{folder}', 'link'); open('link/kept').read()",
    "change a mode by descriptor": "import os; os.fchmod(os.open('{file}', 0), 0o777)",
    "change an owner by descriptor": "import os; os.fchown(os.open('{file}', 0), 1, 1)",
    "change times by descriptor": "import os; os.utime(os.open('{file}', 0), (1, 1))",
    "change an attribute by descriptor": "import os; os.setxattr(os.open('{file}', 0), 'user.x', b'1')",
    "change Python for all": "import os; open(os.__file__, 'a')",
    "change the mode of Python": "import os; os.chmod(os.__file__, 0o777)",
    "climb out of the folder": "import os\nfor _ in range(64): os.chdir('..')\nopen(os.getcwd() + '{file}')",
    "an inherited descriptor": "import os\nfor fd in range(3, 64):\n    try: os.fstat(fd)\n    except OSError: continue\n"
    "    print('escaped')\n1 / 0",
    "a user namespace": SYSCALL + "assert call(272, 0x10000000) == 0",
    "mount": SYSCALL + "assert call(165, b'none', b'/work', b'tmpfs', 0, 0) == 0",
    "unmount": SYSCALL + "assert call(166, b'/work', 2) == 0",
    "root": "import os; os.setuid(0)",
    "settings of the kernel": "open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')",
    "a device": "import os; os.mknod('disk', 0o60666, os.makedev(254, 0))",
    "a program of another user": "import subprocess; assert subprocess.run(['sudo', '-n', 'true']).returncode == 0",
    "kernel modules": SYSCALL + "assert call(313, 0, b'', 0) == 0",
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "the host's name": "import socket; socket.sethostname('x')",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)",
    "ask for a name": "import socket; socket.getaddrinfo('example.com', 80)",
    "an abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0trl-{port}')",
    "the keys of the user": SYSCALL + "assert call(248, b'user', b'trl', b'1', 1, -3) > 0",
    "the terminal": "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "packages": "import torch",
    "more time": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (600, 600))",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "make what is read-only writable": SYSCALL + "assert call(165, 0, b'/usr', 0, 0x1020, 0) == 0",
}

# Each would use up the machine; all end by a limit or an error of their own.
EXHAUSTIONS = {
    "time": "while True: pass",
    "time, asleep": "import time; time.sleep(600)",
    "time, deaf": "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except OSError: pass\nwhile True: pass",
    "time, in C": "9 ** 9 ** 9",
    "memory": "x = []\nwhile True: x.append(bytearray(10**6))",
    "memory at once": "x = 'a' * 10**11",
    "memory of many": "import os, time\nfor _ in range(12):\n    if not os.fork(): x = b'1' * 10**8; time.sleep(600)\ntime.sleep(600)",
    "memory that is shared": "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 10**7)); x[-1].write(b'1' * 10**7)",
    # A few hundred, and no more and more: where the machine is busy, these would be there before anybody looks.
    "processes": "import os, time\ntry:\n    for _ in range(300):\n        if not os.fork(): break\nexcept OSError: pass\ntime.sleep(600)",
    "threads": "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(600,)).start()",
    "the stack": "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "a large file": "open('big', 'wb').write(b'1' * 10**8)",
    "output": "while True: print('x' * 10**6)",
    "errors": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "descriptors": "import os\nx = [os.dup(0) for _ in range(10_000)]",
}
ON_ITS_DISK = {
    "many large files": "for i in range(100): open(f'f{i}', 'wb').write(b'1' * 10**6)",
    "many files": "for i in range(100_000): open(f'f{i}', 'w').close()",
    "many folders": "import os\nfor i in range(3000): os.mkdir('d'); os.chdir('d')",
    "many links": "import os\nfor i in range(100_000): os.symlink('x', f'l{i}')",
    "a hidden file": "import os\nfor _ in range(100):\n    f = os.memfd_create('x'); os.write(f, b'1' * 10**6)",
    "shared memory": SYSCALL + "assert call(29, 0, 10**9, 0o1666) >= 0",
    "messages": SYSCALL + "assert call(68, 0, 0o1666) >= 0",
    "the folder of devices": "open('/dev/shm/x', 'w')",
    "the root folder": "open('/x', 'w')",
}
# Each would have a wrong program pass; `double` is to give 4 for 2.
FORGERIES = {
    "leave early": "raise SystemExit(0)",
    "leave at once": "import os; os._exit(0)",
    "leave when called": "import os\ndef double(x): os._exit(0)",
    "agree with everything": "class Yes:\n    def __eq__(self, other): return True\ndef double(x): return Yes()",
    "agree as a number": "class Yes(int):\n    def __eq__(self, other): return True\ndef double(x): return Yes(5)",
    "change assertions": "import builtins\nclass AssertionError(Exception): pass\n"
    "builtins.AssertionError = None\ndef double(x): return 5",
    "change built-in names": "import builtins\nbuiltins.len = len = lambda x: 4\ndef double(x): return [x]",
    "change the caller": "import sys\ndef double(x):\n    f = sys._getframe()\n"
    "    while f: f.f_globals['__asserted__'] = 1; f = f.f_back\n    return 5",
    "answer on the wire": "import os\nfor fd in range(64):\n    try: os.write(fd, b'[\"result\", 4, []]\\n' * 9)\n"
    "    except OSError: pass",
    "report in place of the tests": "import os\nfor fd in range(64):\n"
    '    try: os.write(fd, b\'{"passed": true, "why": ""}\')\n    except OSError: pass\nos._exit(0)',
    "raise what ends loops": "def double(x): raise StopIteration",
    "raise what ends programs": "def double(x): raise SystemExit(0)",
    "give what cannot be read": "def double(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "hang": "def double(x):\n    while True: pass",
}


@pytest.fixture
def trainer(tmp_path):
    """What the programs are told of the process that runs them, which has to be the same before and after."""
    kept = tmp_path / "kept"
    kept.write_text("1")
    hits = []
    before = signal.signal(signal.SIGUSR1, lambda *_: hits.append(1))

    def state():
        limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
        place = kept.stat()
        priority = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), os.sched_getaffinity(0)
        file = kept.read_text(), place.st_mode, place.st_uid, place.st_mtime_ns, sorted(os.listdir(tmp_path))
        return limits, priority, file, os.getcwd(), socket.gethostname(), os.listxattr(kept), list(hits)

    at_first = state()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        port = server.getsockname()[1]
        named.bind(f"\0trl-{port}")
        named.listen()
        place = {"pid": os.getpid(), "group": os.getpgrp(), "user": os.getuid(), "port": port}
        yield place | {"file": kept, "folder": tmp_path}
    signal.signal(signal.SIGUSR1, before)
    assert state() == at_first


def fill(program, values):
    for name, value in values.items():
        program = program.replace("{" + name + "}", str(value))
    return program


@isolated
@pytest.mark.parametrize("name", ESCAPES)
def test_escapes(name, trainer):
    program = fill(ESCAPES[name], trainer) + "\nprint('escaped')"
    outcome = run_program(BubblewrapRunner(), program, limits=AMPLE)
    assert "escaped" not in outcome.stdout
    assert not outcome.passed, "refused at once, not ended by a limit"
    assert not outcome.succeeded
    assert "SyntaxError" not in outcome.stderr
    assert "NameError" not in outcome.stderr


@isolated
@pytest.mark.parametrize("name", EXHAUSTIONS | ON_ITS_DISK)
def test_exhaustions(name, trainer):
    limits = SHORTER if name.startswith("time") else SHORT
    assert not run_program(BubblewrapRunner(), (EXHAUSTIONS | ON_ITS_DISK)[name], limits=limits).succeeded


@pytest.mark.parametrize("name", EXHAUSTIONS)
def test_limits_of_a_subprocess(name, trainer):
    limits = SHORTER if name.startswith("time") else SHORT
    assert not run_program(SubprocessRunner(), EXHAUSTIONS[name], limits=limits).succeeded


@isolated
@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries(name, trainer):
    tests = "assert len([1]) == 1\nassert double(2) == 4"
    assert not run_tests(BubblewrapRunner(), FORGERIES[name], tests, limits=SHORT).held


@pytest.mark.parametrize("name", ["agree with everything", "leave at once", "report in place of the tests"])
def test_forgeries_of_a_subprocess(name, trainer):
    assert not run_tests(SubprocessRunner(), FORGERIES[name], "assert double(2) == 4", limits=SHORT).held


@isolated
def test_which_limit_ended_a_program_is_known():
    expected = {"time, asleep": "seconds", "output": "output", "errors": "output", "memory of many": "megabytes"}
    for name, limit in expected.items():
        limits = SHORT if limit == "seconds" else Limits(seconds=60, megabytes=256)
        assert run_program(BubblewrapRunner(), EXHAUSTIONS[name], limits=limits).passed == limit


@isolated
def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    deep = "import os\nfor i in range(3000): os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)"
    run_program(SubprocessRunner(), deep, limits=AMPLE)
    run_program(BubblewrapRunner(), "import os, time\nif not os.fork(): time.sleep(600)", limits=AMPLE)
    assert list(tmp_path.iterdir()) == []
    assert not subprocess.run(["pgrep", "-g", str(os.getpid())], capture_output=True).stdout


def test_a_folder_without_permissions_is_removed(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    inner.chmod(0)
    inner.parent.chmod(0)
    remove(str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


@isolated
def test_the_isolation_is_named_in_the_log(caplog, monkeypatch):
    find_runner.cache_clear()
    with caplog.at_level(logging.INFO, "trl"):
        assert find_runner().isolates
    assert "Programs run in bubblewrap" in caplog.text
    assert "network" in caplog.text


def test_without_isolation_a_second_consent_is_needed(caplog, monkeypatch):
    find_runner.cache_clear()
    monkeypatch.setattr(choice.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="bubblewrap is not installed .* set without_isolation=True"):
        get_code_reward(run_untrusted_code=True)
    with caplog.at_level(logging.WARNING, "trl"):
        reward = get_code_reward(run_untrusted_code=True, without_isolation=True, seconds=60)
    assert "protects only against accidents" in caplog.text
    assert reward(completions=["def f(): return 1"], tests=[["assert f() == 1", "assert f() == 2"]]) == [0.5]
    find_runner.cache_clear()


# ---- what tests may do with a program that runs elsewhere ----

STACK = """
import collections, enum, math
Point = collections.namedtuple("Point", "x y")
class Color(enum.IntEnum):
    RED = 1
class Empty(LookupError): pass
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self):
        if not self.items: raise Empty("nothing here")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __contains__(self, x): return x in self.items
    def __add__(self, other):
        s = Stack(); s.items = self.items + other.items; return s
def apply(f, x): return f(x)
def sort(x): x.sort()
def head(node): return (node.value, node.next.value)
def fill(node): node.value = 7
def count(n):
    yield from range(n)
def words(text): return collections.Counter(text.split())
total = 0
def add(n):
    global total
    total += n
"""
HOLD = {
    "values": "assert apply(abs, -2) == 2 and apply(str, 2) == '2'",
    "kinds": "x = [(1, 2.5), {3: b'a'}, {4}, None, True, 1j, 'é\\ud800', frozenset([1]), 10**5000]\n"
    "assert apply(lambda y: y, x) == x",
    "callbacks": "assert apply(lambda x: x + 1, 2) == 3",
    "lists that are changed": "x = [2, 1]\nsort(x)\nassert x == [1, 2]",
    "objects": "s = Stack()\ns.push(1)\ns.push(2)\nassert len(s) == 2 and 1 in s and 3 not in s and s.pop() == 2",
    "fields": "s = Stack()\ns.items = [5]\nassert s.items == [5] and isinstance(s, Stack)",
    "operators": "a, b = Stack(), Stack()\na.push(1)\nb.push(2)\nassert (a + b).items == [1, 2]",
    "errors": "try:\n    Stack().pop()\n    assert False\nexcept Empty as e:\n    assert str(e) == 'nothing here'",
    "errors above": "try:\n    Stack().pop()\nexcept LookupError:\n    assert 1 + 1 == 2",
    "built-in errors": "try:\n    sort(3)\nexcept AttributeError:\n    assert [1]",
    "tuples with names": "p = Point(1, 2)\nassert p == (1, 2) and p.x == 1",
    "counters": "assert words('a b a') == {'a': 2, 'b': 1}",
    "numbers with names": "assert Color.RED == 1",
    "generators": "assert list(count(3)) == [0, 1, 2]",
    "objects of the tests": "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n"
    "n = Node(1, Node(2))\nassert head(n) == (1, 2)\nfill(n)\nassert n.value == 7",
    "modules": "assert math.isclose(apply(math.sqrt, 4), 2.0)",
    "names that change": "add(2)\nadd(3)\nassert total == 5",
    "functions": "def check(candidate):\n    assert candidate(lambda x: x, 1) == 1\ncheck(apply)",
    "functions named test": "def test_it():\n    assert apply(len, 'ab') == 2",
    "imports": "from solution import apply as a\nassert a(len, 'ab') == 2",
    "raising": "if apply(len, 'ab') != 2: raise ValueError",
}
FAIL = {
    "a wrong value": "assert apply(abs, -2) == 3",
    "a missing name": "assert missing(1) == 1",
    "nothing is called": "def check(candidate):\n    assert candidate(1) == 1",
    "a later one": "assert apply(abs, 1) == 1\nassert apply(abs, 1) == 2",
    "raising": "if apply(len, 'ab') != 3: raise ValueError",
    "leaving": "assert apply(abs, 1) == 1\nraise SystemExit(0)",
    "no Python": "assert (",
}


@isolated
@pytest.mark.parametrize("name", HOLD)
def test_tests_that_hold(name):
    outcome = run_tests(BubblewrapRunner(), STACK, HOLD[name], limits=AMPLE)
    assert outcome.held, outcome.stderr


@isolated
@pytest.mark.parametrize("name", FAIL)
def test_tests_that_fail(name):
    assert not run_tests(BubblewrapRunner(), STACK, FAIL[name], limits=AMPLE).held


@isolated
def test_the_tests_are_out_of_reach_for_what_they_hand_over():
    """A function of the tests may be called; its globals, where they count, may not be had."""
    reach = "def apply(f, x):\n    f.__globals__['__asserted__']()\n    return 3"
    assert not run_tests(BubblewrapRunner(), reach, "assert apply(lambda x: x, 1) == 3", limits=AMPLE).held
    reach = "def head(n):\n    n.__class__.__init__.__globals__.clear()\n    return 1"
    tests = "class Node:\n    def __init__(self): pass\nassert head(Node()) == 1"
    assert not run_tests(BubblewrapRunner(), reach, tests, limits=AMPLE).held


@isolated
def test_a_reward_can_be_sent_to_other_processes():
    reward = pickle.loads(pickle.dumps(get_code_reward(run_untrusted_code=True, seconds=60)))
    assert reward(completions=["x = 1"], tests=[["assert x == 1"]]) == [1.0]


@isolated
def test_many_at_a_time_keep_their_limits():
    start = time.monotonic()
    reward = get_code_reward(run_untrusted_code=True, seconds=1.0, processes=4)
    assert reward(completions=["while True: pass"] * 4, tests=[["assert x == 1"]] * 4) == [0.0] * 4
    assert time.monotonic() - start < 60, "each would run for ever"
