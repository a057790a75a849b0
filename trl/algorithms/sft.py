"""Supervised fine-tuning: maximise the likelihood of the given tokens.

nll                −log π(t)
label smoothing    −(1 − ε) log π(t) − ε Σ_v log π(v) / V         (Szegedy et al. 2015, arXiv:1512.00567, Sec. 7)
dft                −sg[π(t)] log π(t)                              (Wu et al. 2025, arXiv:2508.05629, Eq. 9)

DFT weights each token by its probability, without gradient (sg). SFT is a policy gradient with reward 1/π, in which
improbable tokens dominate; the weight cancels that 1/π.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trl.ops.shapes import shapes
from trl.types import Metrics, Scores


def nll(scores: Scores) -> Tensor:
    """−log π(t), `[N,C]`."""
    return -scores.logprobs


def dft(scores: Scores) -> Tensor:
    """−sg[π(t)] log π(t), `[N,C]`: arXiv:2508.05629, Eq. 9."""
    return -scores.logprobs.detach().exp() * scores.logprobs


LOSSES: dict[str, Callable[[Scores], Tensor]] = {"nll": nll, "chunked_nll": nll, "dft": dft}


@shapes(loss="N C")
def smoothed(loss: Tensor, scores: Scores, *, epsilon: float) -> Tensor:
    """(1 − ε) loss − ε Σ_v log π(v) / V: the target mixed with the uniform distribution. Needs `scores.mean_logprob`."""
    return (1 - epsilon) * loss - epsilon * scores.mean_logprob


def metrics(scores: Scores) -> Metrics:
    """Metrics `[N,C]`: 1 where a token is the most likely one, and the entropy of the distribution it is from."""
    return {"mean_token_accuracy": scores.greedy, "entropy": scores.entropy.detach()}
