"""Losses of preference pairs that need no reference: SFT, CPO, SimPO, AlphaPO, ORPO.

Without π_ref nothing regularises the policy, so each loss uses mean log-probabilities, log π(y|x) / |y|, or adds the
negative log-likelihood of the chosen completion, or both. Arguments and results are tensors `[P]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trl.algorithms.f_dpo import power
from trl.ops.shapes import shapes


@shapes(logit="P")
def logistic(logit: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε) log σ(logit) − ε log σ(−logit): binary cross-entropy for labels that are wrong with probability ε.

    Bradley–Terry for ε = 0. For ε > 0 this is conservative DPO (Mitchell, 2023), with its minimum at the finite logit
    log((1−ε)/ε).
    """
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


@shapes(chosen_nll="P")
def sft(chosen_nll: Tensor) -> Tensor:
    """−log π(y_w) / |y_w|: supervised fine-tuning on the chosen completion.

    RPO (arXiv:2404.19733, Eq. 1), MPO (arXiv:2411.10442) and CPO add this term to a preference loss.
    """
    return chosen_nll


@shapes(chosen="P", rejected="P", chosen_nll="P")
def cpo(
    chosen: Tensor, rejected: Tensor, chosen_nll: Tensor, *, beta: float, label_smoothing: float = 0.0, cpo_alpha: float
) -> Tensor:
    """−log σ(β [log π(y_w) − log π(y_l)]) − α log π(y_w) / |y_w|.

    DPO of log-probabilities, that is, with a uniform reference, plus the `sft` term. CPO, arXiv:2401.08417, Eq. 3.
    """
    return logistic(beta * (chosen - rejected), label_smoothing) + cpo_alpha * chosen_nll


@shapes(chosen="P", rejected="P")
def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, simpo_gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β [m_w − m_l] − γ), with mean log-probabilities m as rewards.

    γ is the target margin. SimPO, arXiv:2405.14734, Eq. 6.
    """
    return logistic(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


@shapes(chosen="P", rejected="P")
def alphapo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    simpo_gamma: float,
    alphapo_alpha: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO with the reward (1 − p^−α) / α of p = exp(mean log-probability) in place of log p.

    α > 0 emphasises improbable completions; α → 0 is SimPO. AlphaPO, arXiv:2501.03884.
    """
    reward_w, reward_l = power(chosen, -alphapo_alpha), power(rejected, -alphapo_alpha)
    return simpo(reward_w, reward_l, beta=beta, simpo_gamma=simpo_gamma, label_smoothing=label_smoothing)


@shapes(chosen="P", rejected="P", chosen_nll="P")
def orpo(chosen: Tensor, rejected: Tensor, chosen_nll: Tensor, *, beta: float) -> Tensor:
    """−log π(y_w) / |y_w| − λ log σ(log odds(y_w) − log odds(y_l)), of mean log-probabilities; λ is `beta`.

    odds(y) = p / (1 − p) with p = exp(mean log-probability). ORPO, arXiv:2403.07691, Eq. 4, 6 and 7.
    """
    return chosen_nll - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 − p)) from log p, with p kept below 1, so that the result is finite."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - torch.log(-torch.expm1(logprob))
