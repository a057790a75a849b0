"""Runs that are killed, at random moments and at those at which the disk is touched, go on and end as if they had not been.

`python -m tests.stops.kills` does it by hand, and prints the table; so does pytest with `-s`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import WITHOUT_GPU, fast_python

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "kills"),
    [("--run sft --kills 40", 40), ("--run grpo --aimed --every 5", 12)],
)
def test_every_kill_is_survived(words, kills):
    command = [fast_python(), "-m", "tests.stops.kills", *words.split()]
    done = subprocess.run(
        command,
        env={**os.environ, **WITHOUT_GPU},
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    summary = done.stdout.splitlines()[-1].split()
    assert int(summary[0]) >= kills
    assert summary[-9] == summary[0], "as many ended well as were killed"
