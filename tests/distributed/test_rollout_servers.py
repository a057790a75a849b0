"""Two processes of a trainer with one server, under engines that shard: all are served, and weights are gathered layer
by layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MODELS
from tests.processes import run_well, told, under
from tests.serve.support import serve

PROGRAM = Path(__file__).parent / "sample_on_server.py"


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_two_processes_and_one_server(engine, tmp_path):
    with serve(MODELS["llama"](max_position_embeddings=128)) as served:
        run_well(under(engine), PROGRAM, tmp_path, served.url, "plain", "dora")
        asked = list(served.asked)
    found = told(tmp_path)
    for rank in (0, 1):
        for case in ("plain", "dora"):
            sampled, expected = found[rank, case]
            assert sampled == expected
            assert len(sampled) == 1 + rank
            assert found[rank, f"{case} difference"] < 1e-3
            assert found[rank, f"{case} alive"] <= 2  # the weights of one module
    assert asked.count("/collective_rpc") == 6  # three versions of each model, by one process
