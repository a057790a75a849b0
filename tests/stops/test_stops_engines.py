"""Sharded weights: a run that was stopped and gone on with is, to the bit, the one that was never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils import is_deepspeed_available

from trl.cli.launch import find_config

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, warnings
from pathlib import Path
import torch
from tests.stops.runs import RUNS, StopAt, differences, found

warnings.simplefilter("ignore")
torch.set_num_threads(1)

def ended(trainer):
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # gathered on one process
    return {name: value.clone() for name, value in weights.items()}, found(trainer)[1]

for name in sys.argv[2:]:
    folder, options = Path(sys.argv[1], name), {"use_cpu": False, "max_steps": 4}
    whole = RUNS[name](folder / "whole", **options)
    whole.train()
    expected = ended(whole)
    RUNS[name](folder / "parts", [StopAt(2)], **options).train()
    again = RUNS[name](folder / "parts", **options)
    again.train(resume_from_checkpoint=True)
    words = f"FOUND {type(again.model_wrapped).__name__} {differences(expected, ended(again))}\\n"
    sys.stdout.write(words)  # at once: the other process writes as well
    sys.stdout.flush()
"""


@pytest.mark.parametrize(("engine", "names"), [("fsdp2", ["sft", "rloo"]), ("zero2", ["sft"])])
def test_a_run_in_parts_is_the_whole_run(engine, names, tmp_path):
    if engine.startswith("zero") and not is_deepspeed_available():
        pytest.skip("DeepSpeed is not installed: pip install 'trl[deepspeed]'")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(find_config(engine)), "--num_processes", "2"]
    command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kind = {"fsdp2": "FSDPGPT2LMHeadModel", "zero2": "DeepSpeedEngine"}[engine]
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines == [f"FOUND {kind} []"] * (2 * len(names))
