"""Two processes: going on to the bit, skipping the same steps, and failing together. One launch for all of it."""

from __future__ import annotations

import signal

import pytest

from tests.processes import TOGETHER, run_well
from tests.processes import told as told_in

pytestmark = pytest.mark.slow

RUNS = (
    "sft",
    "sft, a stream",
    "sft, balanced by length",
    "reward",
    "dpo",
    "kto",
    "bco",
    "cpo",
    "ppo",
    "grpo",
    "rloo",
    "online dpo",
)
SCRIPT = """
import os, resource, signal, sys, warnings
from pathlib import Path
import torch
from transformers import TrainerCallback
from tests import processes
from tests.stops.runs import RUNS, differences, found, in_parts, whole
from tests.stops.test_stops_checkpoint import SAVING, Limit
from tests.stops.test_stops_finite import make
from trl.training.checkpoint import CheckpointError
from trl.training.nonfinite import NonFiniteError
from trl.callbacks.stop import stop_on_signal

warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def tell(name, found):
    processes.tell(folder, name, found)

for name in sys.argv[2:]:
    tell(name, differences(whole(RUNS[name], folder / name), in_parts(RUNS[name], folder / name, (1, 3, 4))))

class Raise(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2 and rank == 1:
            signal.raise_signal(signal.SIGTERM)

trainer = RUNS["sft"](folder / "signal", [Raise()])
with stop_on_signal(trainer) as stop:
    trainer.train()
again = RUNS["sft"](folder / "signal")
again.train(resume_from_checkpoint=True)
tell("signal", [stop.signal, trainer.state.global_step, differences(whole(RUNS["sft"], folder / "signal"), found(again))])

trainer = make(folder / "skip", 3, max_steps=4)  # the second process has the bad row in the second step
trainer.train()
tell("skipped", (trainer.steps.skipped, trainer.model.lm_head.weight.double().sum().item()))

try:
    make(folder / "end", 3, 5, max_skipped_steps=2).train()
except NonFiniteError as error:
    tell("ended", str(error))

callbacks = [Limit(2, 1000)] if rank == 1 else []
try:
    RUNS["sft"](folder / "full", callbacks, **SAVING).train()
except CheckpointError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    tell("full", str(error))
tell("left", sorted(path.name for path in (folder / "full").glob("*checkpoint*")))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[tuple[int, str], object]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    run_well(TOGETHER, SCRIPT, folder, *RUNS)
    return told_in(folder)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_parts_is_the_whole_run(told, name):
    assert told[0, name] == told[1, name] == []


def test_a_signal_to_one_stops_both_and_they_go_on(told):
    assert told[0, "signal"] == told[1, "signal"] == [signal.SIGTERM, 3, []]


def test_both_skip_the_step_that_is_bad_on_one(told):
    assert told[0, "skipped"] == told[1, "skipped"]
    assert told[0, "skipped"][0] == 1


def test_both_end_with_the_rows_of_either(told):
    assert told[0, "ended"] == told[1, "ended"]
    assert "train_dataset[5] 'row 5 Z</s>'." in told[0, "ended"]


def test_a_disk_that_is_full_for_one_ends_both(told):
    assert "failed on 1 of the other processes" in told[0, "full"]
    assert "No space left on the disk" in told[1, "full"]
    assert told[0, "left"] == ["checkpoint-1"]
