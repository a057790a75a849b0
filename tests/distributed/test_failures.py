"""A failure in one process ends all of them, soon and with its error; a wait that takes too long says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import WHOLE_END
from tests.processes import TOGETHER, run

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys, time
from datasets import Dataset
from tests.conftest import MODELS, make_tokenizer
from trl.trainers.sft import SFTConfig, SFTTrainer

RANK, KIND = int(os.environ["RANK"]), sys.argv[2]


class Failing(SFTTrainer):
    def prepare_model(self):
        super().prepare_model()
        if KIND == "start":
            if RANK == 1:
                raise ArithmeticError("the start of process 1")
            self.accelerator.wait_for_everyone()

    def loss(self, model, batch):
        if RANK == 1 and self.state.global_step == 2:
            if KIND == "raise":
                raise ArithmeticError("the third step of process 1")
            time.sleep(300)
        return super().loss(model, batch)


options = {"output_dir": f"{sys.argv[1]}/out", "max_steps": 6, "save_strategy": "no", "html_report": False, "ddp_timeout": 12}
rows = Dataset.from_dict({"text": [f"{i} and more" for i in range(12)]})
Failing(MODELS["llama"](), SFTConfig(**options), train_dataset=rows, tokenizer=make_tokenizer()).train()
"""


def ends(kind: str, folder: Path) -> str:
    """What two processes write before they end, which is long before the one that sleeps would have woken."""
    done = run(TOGETHER, PROGRAM, folder, kind, timeout=150)
    assert done.returncode != 0
    return done.stderr


def test_an_error_in_one_process_ends_all(tmp_path, monkeypatch):
    monkeypatch.setenv(WHOLE_END, "1")
    assert "ArithmeticError: the third step of process 1" in ends("raise", tmp_path)


def test_an_error_before_training_is_all_that_is_told(tmp_path, monkeypatch):
    """The process that waits says in one line that another has failed, without the text of its lost connection."""
    monkeypatch.setenv(WHOLE_END, "1")
    errors = ends("start", tmp_path)
    assert "ArithmeticError: the start of process 1" in errors
    assert "by peer" not in errors.lower()


def test_a_wait_has_a_limit(tmp_path):
    words = "Process 0 of 2 waited for the others in step 3: one of them did not arrive within ddp_timeout=12 s."
    assert words in ends("sleep", tmp_path)
