"""What two processes have to decide alike: when to stop and save, and which rows each of them trains on."""

from __future__ import annotations

import pytest

from tests.processes import TOGETHER, run_well, told

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys
from datasets import Dataset
from transformers import TrainerCallback
from tests.conftest import MODELS, make_tokenizer
from tests.processes import tell
from trl.trainers.sft import SFTConfig, SFTTrainer

FOLDER, RANK = sys.argv[1], int(os.environ["RANK"])
ROWS = Dataset.from_dict({"text": ["a" * (i + 1) for i in range(12)]})


class Alone(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_save |= RANK == 0 and state.global_step == 1
        control.should_training_stop |= RANK == 1 and state.global_step == 2


class Telling(SFTTrainer):
    def loss(self, model, batch):
        tell(FOLDER, f"rows {self.state.global_step}", int(batch.tokens))
        return super().loss(model, batch)


def sft(name, trainer_class, callbacks=(), **options):
    common = {"output_dir": f"{FOLDER}/{name}", "save_strategy": "no", "html_report": False, "ddp_timeout": 60}
    args = SFTConfig(**common, use_cpu=True, **options)
    model, tokenizer = MODELS["llama"](), make_tokenizer()
    return trainer_class(model, args, train_dataset=ROWS, tokenizer=tokenizer, callbacks=[*callbacks])


trainer = sft("stopped", SFTTrainer, [Alone()], max_steps=9)
trainer.train()
tell(FOLDER, "stopped", [trainer.state.global_step, sorted(os.listdir(f"{FOLDER}/stopped"))])
by_length = {"train_sampling_strategy": "batch_rebalance", "per_device_train_batch_size": 2, "num_train_epochs": 1}
sft("balanced", Telling, **by_length).train()
"""


def test_processes_decide_alike(tmp_path):
    run_well(TOGETHER, PROGRAM, tmp_path)
    found = told(tmp_path)
    for rank in range(2):
        step, files = found[rank, "stopped"]
        assert step == 2  # a callback of process 1 ended the run there, and one of process 0 saved the step before
        assert [name for name in files if name.startswith("checkpoint")] == ["checkpoint-1"]
    tokens = [found[rank, f"rows {step}"] for rank in range(2) for step in range(3)]
    assert sum(tokens) == sum(range(1, 13)) + 12  # every row once, with its end
