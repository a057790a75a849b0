"""Two processes: runs that were stopped and gone on with are, to the bit, those that were never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, warnings
from pathlib import Path
import torch
from tests.stops.runs import RUNS, differences, in_parts, whole

warnings.simplefilter("ignore")
torch.set_num_threads(1)
for name in sys.argv[2:]:
    folder = Path(sys.argv[1], name)
    print("FOUND", name, differences(whole(RUNS[name], folder), in_parts(RUNS[name], folder, (1, 2, 4))), flush=True)
"""
CHOSEN = ("sft", "sft, a stream", "bco", "dpo, a reference that moves", "grpo")


def run_script(
    text: str, folder: Path, *words: str, processes: int = 2, timeout: int = 280
) -> subprocess.CompletedProcess:
    """Run a program in several processes, as torchrun does."""
    script = folder / "script.py"
    script.write_text(text)
    environment = {
        "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(script), str(folder), *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=os.getcwd(), check=False
    )


def test_runs_in_parts_are_whole_runs(tmp_path):
    done = run_script(SCRIPT, tmp_path, *CHOSEN)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert sorted(lines) == sorted([f"FOUND {name} []" for name in CHOSEN] * 2)
