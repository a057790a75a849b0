"""A program that is forked ends as one that the interpreter runs: same status, same words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import fast_python

PROGRAMS = {
    "well": "print('done')",
    "with a status": "import sys; print('done'); sys.exit(3)",
    "with words": "import sys; sys.exit('no such file')",
    "with an error": "raise ValueError('a word')",
    "by Ctrl-C": "raise KeyboardInterrupt",
    "with what is registered": "import atexit; atexit.register(print, 'last'); print('first')",
    "after its threads": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start(); print('first')",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_as_under_the_interpreter(name):
    plain, forked = (
        subprocess.run([python, "-c", PROGRAMS[name]], capture_output=True, text=True)
        for python in (sys.executable, fast_python())
    )
    assert (forked.returncode, forked.stdout) == (plain.returncode, plain.stdout)
    assert forked.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
