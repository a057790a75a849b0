"""Two processes, of which one has an image in its batch and the other none, train as one does, whole or with a frozen encoder."""

from __future__ import annotations

import pytest

from tests.processes import ALONE, run_well, told, under

pytestmark = pytest.mark.long

PROGRAM = """
import os
import sys
from pathlib import Path

import transformers
from peft import LoraConfig

from tests.processes import tell
from tests.vision.support import llava
from tests.vision.test_vision_training import rows, trainer_of

folder = sys.argv[1]
transformers.logging.set_verbosity_error()
each = 2 // int(os.environ.get("WORLD_SIZE", 1))
options = {"per_device_train_batch_size": each, "shuffle_dataset": False, "train_sampling_strategy": "sequential"}
models = iter([llava() for _ in range(4)])  # those made once ZeRO-3 is known are made in shards
for name, kind in (("sft", "completion"), ("dpo", "pairs")):
    for way in ("whole", "adapter"):
        data = rows(kind).select([0, 2, 0, 2])  # with an image, without, …
        adapter = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False) if way == "adapter" else None
        run = trainer_of(name, Path(folder, name + way), next(models), data, peft_config=adapter, **options)
        run.train()
        logs = [log for log in run.state.log_history if "loss" in log]
        tell(folder, f"{name} {way}", [[log["loss"], log["grad_norm"]] for log in logs])
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_well(ALONE, PROGRAM, folder)
    return told(folder)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_a_process_without_images_goes_along(engine, alone, tmp_path):
    run_well(under(engine), PROGRAM, tmp_path, timeout=300)
    found = told(tmp_path)
    assert len(found) == 2 * len(alone)
    for (rank, name), logs in found.items():
        for (loss, norm), (expected_loss, expected_norm) in zip(logs, alone[0, name], strict=True):
            assert loss == pytest.approx(expected_loss, abs=1e-4), (rank, name)
            assert norm == pytest.approx(expected_norm, rel=1e-3), (rank, name)
