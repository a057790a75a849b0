"""Diffusion-GRPO in two processes gives the step of one, and SIGTERM leaves a checkpoint that goes on to the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.processes import ALONE, TOGETHER, run_well, told

pytestmark = pytest.mark.slow

PROGRAM = """
import os
import signal
import sys

import torch
import transformers
from transformers import TrainerCallback

from tests.diffusion.support import online, weights_of
from tests.processes import tell
from trl import stop_on_signal
from trl.trainers.diffusion.grpo import DiffusionGRPOTrainer

folder, way = sys.argv[1], sys.argv[2]
transformers.logging.set_verbosity_error()
each = 4 // int(os.environ.get("WORLD_SIZE", 1))
options = {"per_device_train_batch_size": each, "beta": 0.1, "optim": "sgd", "shuffle_dataset": False}
if way != "split":
    options |= {"max_steps": 4, "num_iterations": 2, "optim": "adamw_torch"}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)


run = online(DiffusionGRPOTrainer, f"{folder}/out-{'signal' if way == 'resume' else way}", **options)
if way == "signal":
    run.add_callback(Stop())
    with stop_on_signal(run):
        run.train()
else:
    run.train(resume_from_checkpoint=True if way == "resume" else None)
tell(folder, way, weights_of(run).tolist())
"""


def test_two_processes_take_the_step_of_one(tmp_path):
    run_well(ALONE, PROGRAM, tmp_path / "one", "split")
    run_well(TOGETHER, PROGRAM, tmp_path / "two", "split")
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    assert two[0, "split"] == two[1, "split"]
    alone, together = torch.tensor(one[0, "split"]), torch.tensor(two[0, "split"])
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.long
def test_a_signal_in_the_middle_of_a_rollout_batch(tmp_path):
    for way in ("whole", "signal", "resume"):
        run_well(ALONE, PROGRAM, tmp_path, way)
    found = told(tmp_path)
    assert found[0, "resume"] == found[0, "whole"]
    assert found[0, "signal"] != found[0, "whole"]
