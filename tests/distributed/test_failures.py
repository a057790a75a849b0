"""A failure in one process ends all of them, soon and with its error; a wait that takes too long says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys, time
from datasets import Dataset
from tests.conftest import MODELS, make_tokenizer
from trl.trainers.sft import SFTConfig, SFTTrainer

RANK, KIND = int(os.environ["RANK"]), sys.argv[1]


class Failing(SFTTrainer):
    def loss(self, model, batch):
        if RANK == 1 and self.state.global_step == 2:
            if KIND == "raise":
                raise ArithmeticError("the third step of process 1")
            time.sleep(300)
        return super().loss(model, batch)


options = {"output_dir": sys.argv[2], "max_steps": 6, "save_strategy": "no", "html_report": False, "ddp_timeout": 10}
rows = Dataset.from_dict({"text": [f"{i} and more" for i in range(12)]})
Failing(MODELS["llama"](), SFTConfig(**options), train_dataset=rows, tokenizer=make_tokenizer()).train()
"""


def ends(kind: str, folder: Path) -> tuple[str, float]:
    """What two processes write before they end, and the seconds that takes."""
    script = folder / "train.py"
    script.write_text(PROGRAM)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    }
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(folder / "home")}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *launcher, str(script), kind, str(folder / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr, time.monotonic() - started


def test_an_error_in_one_process_ends_all(tmp_path):
    errors, seconds = ends("raise", tmp_path)
    assert "ArithmeticError: the third step of process 1" in errors
    assert seconds < 60


def test_a_wait_has_a_limit(tmp_path):
    errors, seconds = ends("sleep", tmp_path)
    assert "Process 0 of 2 waited for the others in step 3: one of them did not come within ddp_timeout=10 s." in errors
    assert seconds < 90
