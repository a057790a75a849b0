"""The processes that `benchmarks/run.py` keeps: they answer, they are ended when they take too long, and say why they died."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from run import Bench, WorkerFailed
from workloads import WORKLOADS

WORKER = """
import json, sys, time
for line in sys.stdin:
    options = json.loads(json.loads(line)[json.loads(line).index("--options") + 1])
    if "sleep" in options:
        time.sleep(options["sleep"])
    if "die" in options:
        sys.exit(options["die"])
    print(json.dumps({"tokens": [1]}), flush=True)
"""


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    settings = {"steps": 1, "seed": 0, "threads": 1, "device": "cuda", "worker": tmp_path / "worker.py"}
    bench = Bench(tmp_path, {"ours": sys.executable}, {"ours": {}}, **settings, limit=20)
    yield bench
    bench.close()


def test_one_process_answers_every_question(bench):
    workload = WORKLOADS["kto"]
    assert bench.run(workload, "ours") == {"tokens": [1]}
    process = bench.standing["ours"]
    assert bench.run(workload, "ours") == {"tokens": [1]}
    assert bench.standing["ours"] is process


def test_a_process_that_is_late_is_replaced(bench):
    workload, options = WORKLOADS["kto"], bench.options["ours"]
    options["sleep"] = 60
    with pytest.raises(WorkerFailed, match=r"ours on kto took more than 0 s\."):
        replace(bench, limit=0.2).run(workload, "ours")
    options.clear()
    assert bench.run(workload, "ours") == {"tokens": [1]}


def test_a_process_that_dies_says_why(bench):
    bench.options["ours"]["die"] = "no memory"
    with pytest.raises(WorkerFailed, match="no memory"):
        bench.run(WORKLOADS["kto"], "ours")
