"""A run that was stopped and gone on with is the run that was never stopped: weights and logged numbers, to the bit."""

from __future__ import annotations

import pytest

from tests.stops.runs import RUNS, differences, in_parts, whole

STOPS = (1, 3, 4)
"""In the middle of an epoch, at its end, and in the second one; of samples: twice within a round, and at its end and that of
an epoch. Twice between two logs, and at one."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name.endswith("images") else ()) for name in RUNS]
)
def test_a_run_in_parts_is_the_whole_run(name, tmp_path):
    make = RUNS[name]
    assert not differences(whole(make, tmp_path), in_parts(make, tmp_path, STOPS))
