"""A training step waits for its device once, and sends it one buffer for each forward pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import syncs


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_step_waits_once(method, tmp_path):
    read, sent, batches = syncs.count(method, str(tmp_path))
    assert batches == 2
    assert [place.split(" < ")[0].split()[-1] for place in read.elements()] == ["is_finite"]
    assert sent.total() == (2 * batches if method == "kto" else batches)  # KTO's mismatched pairs are scored apart
