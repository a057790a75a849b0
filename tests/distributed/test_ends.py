"""Programs end in peace, whatever processes exchanged last."""

from __future__ import annotations

import pytest

from tests.forked import WHOLE_END
from tests.processes import run_well

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import torch
from trl.trainers.config import TrainerConfig

TrainerConfig(output_dir=sys.argv[1], report_to="none")
for _ in range(3):
    tensor = torch.ones(1000)
    torch.distributed.all_reduce(tensor, async_op=True).wait()
    del tensor
"""


def test_processes_whose_last_act_is_an_exchange_end_well(tmp_path, monkeypatch):
    monkeypatch.setenv(WHOLE_END, "1")
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    run_well(together, PROGRAM, tmp_path)
