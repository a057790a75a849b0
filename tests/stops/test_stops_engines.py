"""Sharded weights: a run that was stopped and gone on with is, to the bit, the one that was never stopped."""

from __future__ import annotations

import pytest

from tests.processes import run_well, told, under

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, warnings
from pathlib import Path
import torch
from tests.processes import tell
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
    tell(sys.argv[1], name, [type(again.model_wrapped).__name__, differences(expected, ended(again))])
"""


@pytest.mark.parametrize(
    ("engine", "names"), [("fsdp2", ["sft", "rloo"]), pytest.param("zero2", ["sft"], marks=pytest.mark.long)]
)
def test_a_run_in_parts_is_the_whole_run(engine, names, tmp_path):
    run_well(under(engine), SCRIPT, tmp_path, *names)
    kind = {"fsdp2": "FSDPGPT2LMHeadModel", "zero2": "DeepSpeedEngine"}[engine]
    assert told(tmp_path) == {(rank, name): [kind, []] for rank in (0, 1) for name in names}
