"""Which of a prompt's samples make a pair, by hand."""

from __future__ import annotations

import pytest
import torch

from trl.algorithms.dpo import DPO
from trl.algorithms.online_dpo import OnlineDPO
from trl.types import Experience

NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "preferred"),
    [
        ([1.0, 3.0, 2.0, 0.0], [0, 1, 0, -1]),
        ([-5.0, NAN, -7.0, NAN], [1, 0, -1, 0]),
        ([2.0, 2.0, 2.0, 2.0], [0, 0, 0, 0]),
        ([NAN, 4.0, NAN, NAN], [0, 0, 0, 0]),
        ([NAN] * 4, [0, 0, 0, 0]),
    ],
)
def test_the_best_and_the_worst_make_the_pair(rewards, preferred):
    """Whatever stands beside them in the round, of a prompt before and of one after."""
    around = torch.tensor([9.0, -9.0, *rewards, 0.0, 0.5])
    group = torch.tensor([3, 3, 1, 1, 1, 1, 2, 2])
    found = OnlineDPO().advantages(Experience(around, group, torch.ones(8, 1))).signals["preferred"]
    assert found.tolist() == [1, -1, *preferred, -1, 1]


def test_a_reference_is_needed_where_the_loss_reads_one():
    assert OnlineDPO().needs_reference
    assert not OnlineDPO(DPO(reference_free=True)).needs_reference
