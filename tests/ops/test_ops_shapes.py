"""Declared shapes are checked, and what broadcasting would hide is an error that names the argument."""

from __future__ import annotations

import pytest
import torch

from trl.algorithms.advantages import combine_rewards
from trl.algorithms.dpo import sigmoid
from trl.algorithms.policy_gradient import clipped_surrogate
from trl.algorithms.ppo import token_rewards
from trl.errors import ShapeError
from trl.ops.shapes import shapes


def ones(*shape):
    return torch.ones(*shape)


def test_a_vector_is_not_taken_for_a_column():
    with pytest.raises(ShapeError, match=r"sigmoid: rejected has shape \(3, 1\), but \[P\] is expected with P=3"):
        sigmoid(ones(3), ones(3, 1), beta=0.1)
    with pytest.raises(ShapeError, match=r"token_rewards: scores has shape \(2, 1\), but \[N\] is expected"):
        token_rewards(ones(2, 1), ones(2, 3), ones(2, 3), coefficient=0.1)


def test_sizes_are_the_same_by_letter():
    with pytest.raises(
        ShapeError, match=r"combine_rewards: weights has shape \(3,\), but \[F\] is expected with N=4, F=2"
    ):
        combine_rewards(ones(4, 2), ones(3), torch.zeros(4, dtype=torch.long), aggregation="sum_then_normalize")


def test_a_size_may_be_one_where_that_is_declared():
    assert clipped_surrogate(ones(2, 3) * 0, ones(2, 1), low=0.2, high=0.2).shape == (2, 3)
    with pytest.raises(ShapeError, match=r"clipped_surrogate: advantages has shape \(2,\)"):
        clipped_surrogate(ones(2, 3), ones(2), low=0.2, high=0.2)


def test_further_dimensions_are_the_same_for_all():
    @shapes(latents="M ...", noise="M ...", level="M")
    def noised(latents, noise, level):
        return latents

    assert noised(ones(2, 3, 4), ones(2, 3, 4), ones(2)).shape == (2, 3, 4)
    assert noised.__doc__.endswith("Shapes: latents [M,...], noise [M,...], level [M].")
    assert noised(ones(2), ones(2), ones(2)).shape == (2,)
    for wrong in (ones(2, 3), ones(2, 3, 5), ones(3, 3, 4), ones(())):
        with pytest.raises(ShapeError, match=r"noised: noise has shape .* but \[M \.\.\.\] is expected"):
            noised(ones(2, 3, 4), wrong, ones(2))


def test_numbers_and_nothing_are_passed_over():
    @shapes(x="N", y="N")
    def add(x, y=None):
        return x if y is None else x + y

    assert add(ones(2)).tolist() == [1, 1]
    assert add(ones(2), 1.0).tolist() == [2, 2]
    assert add(x=ones(2), y=ones(2)).tolist() == [2, 2]
    with pytest.raises(ShapeError, match="add: y has shape"):
        add(ones(2), y=ones(3))
