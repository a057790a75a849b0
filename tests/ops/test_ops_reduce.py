import pytest
import torch

from trl.ops.reduce import WEIGHTS, masked_mean, masked_whiten

X = torch.tensor([[1.0, 2.0, 9.0], [3.0, 6.0, 9.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])


def test_masked_mean_by_hand():
    assert masked_mean(X, MASK).item() == 3.0
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 4.5]
    assert masked_mean(X, torch.zeros_like(X)).item() == 0.0


def test_the_mean_of_one_or_of_nothing():
    mask = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert masked_mean(X, mask).item() == 2.0
    assert masked_mean(X, mask, dim=1).tolist() == [2.0, 0.0]


def test_whitening_of_two_of_one_and_of_equal_values():
    two = masked_whiten(torch.tensor([1.0, 3.0]), torch.ones(2))
    torch.testing.assert_close(two, torch.tensor([-1.0, 1.0]) / 2**0.5)
    assert masked_whiten(torch.tensor([5.0, 9.0]), torch.tensor([1.0, 0.0])).tolist() == [0, 0]
    assert masked_whiten(torch.full((3,), 4.0), torch.ones(3)).tolist() == [0, 0, 0]


def test_whitening_has_mean_zero_and_unbiased_variance_one():
    # Values 1, 2, 3, 6: mean 3, Σ(x−3)² = 14, variance 14/3.
    white = masked_whiten(X, MASK)
    assert white[0, 0].item() == pytest.approx(-2 / (14 / 3) ** 0.5)
    assert white[:, 2].tolist() == [0, 0]
    kept = masked_whiten(X, MASK, keep_mean=True)
    assert masked_mean(kept, MASK).item() == pytest.approx(3.0)


def test_weights_by_token_and_by_sequence():
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert WEIGHTS["token"](mask).tolist() == mask.tolist()
    sequence = WEIGHTS["sequence"](mask)
    assert sequence.sum(1).tolist() == pytest.approx([1, 1, 0])
    assert sequence[0].tolist() == pytest.approx([1 / 3] * 3)
