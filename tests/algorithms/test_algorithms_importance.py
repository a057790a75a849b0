"""Weights of samples at their bounds, and what is reported of them, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trl.algorithms.importance import Correction, mismatch
from trl.errors import ConfigError

LOG2 = math.log(2)
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
SAMPLER = torch.zeros(2, 3)
OLD = torch.tensor([[LOG2, 2 * LOG2, 0.0], [-LOG2, -2 * LOG2, 3.0]])
"""Weights (2, 4, 1) and (½, ¼); the last token of row 1 is not scored."""


@pytest.mark.parametrize(
    ("low", "high", "kept", "beyond"),
    [
        (None, 1.0, [[0, 0, 1], [0.5, 0.25, 1]], [[1, 1, 0], [0, 0, 0]]),
        (1.0, None, [[2, 4, 1], [0, 0, 1]], [[0, 0, 0], [1, 1, 0]]),
        (0.3, 3.0, [[2, 0, 1], [0.5, 0, 1]], [[0, 1, 0], [0, 1, 0]]),
    ],
)
def test_a_weight_at_a_bound_is_within(low, high, kept, beyond):
    correction = Correction("token_mask", low=low, high=high)
    torch.testing.assert_close(correction(OLD, SAMPLER, MASK), torch.tensor(kept, dtype=torch.float32))
    assert correction.is_beyond(OLD, SAMPLER, MASK).tolist() == beyond


def test_tokens_that_are_not_scored_take_no_part_in_what_is_reported():
    found = mismatch(OLD, SAMPLER, MASK, Correction("token_truncate"))
    expected = {
        "sampling_logp_difference/mean": [[LOG2, 2 * LOG2, 0], [LOG2, 2 * LOG2, 0]],
        "sampling_logp_difference/max": [2 * LOG2, 2 * LOG2],
        "importance_sampling_ratio/mean": [[2, 4, 1], [0.5, 0.25, 1]],
        "importance_sampling_ratio/min": [1, 0.25],
        "importance_sampling_ratio/max": [4, 0.5],
        "kl": [[1 - LOG2, 3 - 2 * LOG2, 0], [LOG2 - 0.5, 2 * LOG2 - 0.75, 0]],
        "masked_share": [[0, 1, 0], [0, 0, 0]],
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[f"sampling/{name}"], torch.tensor(value, dtype=torch.float32))
    above = mismatch(-OLD[1:], SAMPLER[1:], MASK[1:], Correction())
    assert above["sampling/importance_sampling_ratio/min"].item() == pytest.approx(2)


@pytest.mark.parametrize("low", [2.0, 3.0])
def test_bounds_that_leave_nothing(low):
    with pytest.raises(ConfigError, match=f"low={low} and high=2.0: low must be below high"):
        Correction(low=low, high=2.0)
    assert Correction(low=low, high=None).bounds == (low, math.inf)
