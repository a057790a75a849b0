"""Generalised advantage estimation (GAE): how much better an action was than the value function predicted.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t),      A_t = Σ_k (γλ)^k δ_{t+k},      R_t = A_t + V(s_t)

λ trades bias for variance: λ = 0 trusts the value function, A_t = δ_t; λ = 1 trusts the rewards,
A_t = Σ_k γ^k r_{t+k} − V(s_t). Schulman et al. 2016, arXiv:1506.02438, Eq. 16 and Sec. 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl.ops.shapes import shapes


@shapes(rewards="N C", values="N C", mask="N C")
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[N,C]`, from the reward r_t of each token and the value V(s_t) of the state before it, `[N,C]`.

    The state after the last token has value 0. Masked tokens are not actions, so s_{t+1} is the state before the next
    unmasked token. Masked entries of the results are 0 and carry no gradient.
    """
    taken = mask.bool()
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(taken[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(taken[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = advantages * mask
    return advantages, advantages + values * mask
