"""How a batch is seen as pairs: sides, length desensitising, WPO weights."""

import math

import pytest
import torch

from trl.algorithms.pairs import ld_dpo_weights, sides, split_pairs, wpo_weights
from trl.errors import DataError

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.float32)
LOGPROBS = -torch.tensor([[1, 2, 0, 0], [1, 1, 3, 5], [2, 0, 4, 0], [7, 0, 0, 0]], dtype=torch.float32)


def test_chosen_are_even_and_rejected_odd():
    chosen, rejected = split_pairs(torch.arange(6))
    assert (chosen.tolist(), rejected.tolist()) == ([0, 2, 4], [1, 3, 5])


def test_an_odd_batch_has_no_pairs():
    with pytest.raises(DataError, match="chosen one first, then the rejected one"):
        split_pairs(torch.zeros(3))


def test_sides():
    reference = LOGPROBS - 0.25 * MASK
    chosen, rejected = sides(LOGPROBS, reference, MASK)
    assert chosen.logprob.tolist() == [-3.0, -6.0]
    assert chosen.logratio.tolist() == [0.5, 0.5]
    assert chosen.mean_score.tolist() == [0.25, 0.25]
    assert rejected.length.tolist() == [4.0, 1.0]
    assert rejected.nll.tolist() == [2.5, 7.0]
    assert rejected.mean_logprob.tolist() == [-2.5, -7.0]


def test_without_a_reference_the_log_ratio_is_the_log_probability():
    chosen, _ = sides(LOGPROBS, None, MASK)
    assert chosen.logratio.tolist() == [-3.0, -6.0]


def test_tokens_beyond_the_shorter_completion_count_less():
    expected = [[1, 1, 0, 0], [1, 1, 0.25, 0.25], [1, 0, 0.25, 0], [1, 0, 0, 0]]
    assert ld_dpo_weights(MASK, 0.25).tolist() == expected
    torch.testing.assert_close(ld_dpo_weights(MASK, 1.0), MASK)


def test_desensitising_leaves_likelihood_and_length_alone():
    _, plain = sides(LOGPROBS, None, MASK)
    _, weighted = sides(LOGPROBS, None, MASK, weight=ld_dpo_weights(MASK, 0.5))
    assert weighted.logprob.tolist() == [-6.0, -7.0]
    torch.testing.assert_close(weighted.nll, plain.nll)
    torch.testing.assert_close(weighted.length, plain.length)


def test_wpo_weights():
    collision = torch.where(MASK > 0, 0.5, 0.0)
    weights = wpo_weights(LOGPROBS, collision, MASK)
    expected = [math.exp(-1.5 + math.log(2)) * math.exp(-2.5 + math.log(2)), math.exp(-3 - 7) * 4]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_uniform_policy_has_wpo_weight_one():
    # V equally likely tokens: log π = −log V and Σ π² = 1/V
    weights = wpo_weights(-math.log(8) * MASK, MASK / 8, MASK)
    assert weights.tolist() == pytest.approx([1.0, 1.0])
