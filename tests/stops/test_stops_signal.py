"""SIGTERM and Ctrl-C in a user's own program, in one process and in two."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.processes import TOGETHER, WITHOUT_GPU, fast_python
from tests.stops.runs import RUNS
from trl.callbacks.stop import exit_on_signal
from trl.training.checkpoint import checkpoints, newest_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time, warnings
import torch
from transformers import TrainerCallback
from tests.stops.runs import RUNS
from trl.callbacks.stop import exit_on_signal

warnings.simplefilter("ignore")
torch.set_num_threads(1)

class Wait(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            print("in step 3", flush=True)
            while not stop.received:
                time.sleep(0.01)

trainer = RUNS["sft"](sys.argv[1], [Wait()], save_strategy="steps", save_steps=100, logging_steps=1)
with exit_on_signal(trainer) as stop:
    trainer.train(resume_from_checkpoint="last")
print("ended at", trainer.state.global_step, flush=True)
"""


def start(folder: Path, *launcher: str, python: str | None = None) -> subprocess.Popen:
    """The script, by an interpreter, which starts what a launcher starts, too."""
    (folder / "script.py").write_text(SCRIPT)
    python = python or fast_python()
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK")}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}
    return subprocess.Popen(
        [python, *launcher, str(folder / "script.py"), str(folder / "out")],
        env={**environment, **(WITHOUT_GPU if launcher else {}), **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stopped(process: subprocess.Popen, number: int) -> str:
    """Send the signal in step 3; gives what was said."""
    assert any("in step 3" in line for line in process.stdout), process.stderr.read()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=600)
    return stderr


def losses(folder: Path) -> list[float]:
    """What was logged, as the newest checkpoint has it."""
    history = json.loads((newest_checkpoint(folder / "out") / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


class Raise(TrainerCallback):
    """Sends a signal to this process in step 3."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_block_is_left_with_the_status_of_its_signal(tmp_path, capfd, number, status):
    before = signal.getsignal(number)
    trainer = RUNS["sft"](tmp_path, [Raise(number)])
    with pytest.raises(SystemExit) as left, exit_on_signal(trainer):
        trainer.train()
    assert left.value.code == status
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert signal.getsignal(number) is before
    assert "Stopped, with a checkpoint. To resume:" in capfd.readouterr().err


@pytest.mark.slow
def test_a_signal_ends_a_program_and_its_own_words_go_on(tmp_path):
    process = start(tmp_path)
    stderr = stopped(process, signal.SIGTERM)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    words = re.search(r"Stopped, with a checkpoint. To resume:\n\n    (.*)\n", stderr)[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    again = subprocess.run(
        [fast_python(), *shlex.split(words)[1:]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "ended at 7" in again.stdout
    saving = {"save_strategy": "steps", "save_steps": 100, "logging_steps": 1}
    RUNS["sft"](tmp_path / "whole" / "out", **saving).train()
    assert losses(tmp_path) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("python", "words"),
    [
        (None, "tests.forked --serve"),  # whose child every program is that FAST_PYTHON runs
        pytest.param(sys.executable, f"{shlex.join(TOGETHER)} .*script.py", marks=pytest.mark.long),
    ],
)
def test_all_processes_end_after_the_same_step(tmp_path, python, words):
    """And tell the words of the process above them. That they go on to the bit is in test_stops_processes.py."""
    process = start(tmp_path, *TOGETHER, python=python)
    stderr = stopped(process, signal.SIGTERM)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"], stderr
    assert newest_checkpoint(tmp_path / "out")
    assert re.search(rf"To resume:\n\n    .*{words}", stderr)
