"""Losses of tokens, and their gradients, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trl.algorithms.sft import LOSSES, metrics, smoothed
from trl.types import Scores

HALF, EIGHTH = math.log(0.5), math.log(0.125)


@pytest.mark.parametrize(
    ("name", "losses", "gradient"),
    [("nll", [-HALF, -EIGHTH], [-1.0, -1.0]), ("dft", [-HALF / 2, -EIGHTH / 8], [-0.5, -0.125])],
)
def test_losses_and_gradients(name, losses, gradient):
    """Tokens of probability ½ and ⅛; DFT holds them constant as weights."""
    logprobs = torch.tensor([[HALF, EIGHTH]], requires_grad=True)
    loss = LOSSES[name](Scores(logprobs))
    torch.testing.assert_close(loss, torch.tensor([losses]))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([gradient]))


def test_label_smoothing():
    """0.9 · 2 + 0.1 · 5: a loss of 2, and log-probabilities of −5 on the average of the vocabulary."""
    scores = Scores(torch.tensor([[-2.0]]), mean_logprob=torch.tensor([[-5.0]]))
    assert smoothed(torch.tensor([[2.0]]), scores, epsilon=0.1).item() == pytest.approx(2.3)


def test_metrics():
    entropy = torch.tensor([[1.0, 2.0]], requires_grad=True)
    found = metrics(Scores(torch.zeros(1, 2), entropy=entropy, greedy=torch.tensor([[1.0, 0.0]])))
    assert found["mean_token_accuracy"].tolist() == [[1, 0]]
    assert found["entropy"].tolist() == [[1, 2]]
    assert not found["entropy"].requires_grad
