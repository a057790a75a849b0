"""ILQL, implicit language Q-learning: offline reinforcement learning from samples and their rewards.

    y_t    = r_t + γ V(s_{t+1})                      V = 0 after the last action; no gradient
    L_Q    = Σ_i (Q_i(s_t, a_t) − y_t)²
    L_V    = |τ − 1[Q' < V]| (Q' − V(s_t))²          Q' = min_i Q'_i(s_t, a_t), of the target heads
    L_CQL  = −Σ_i log softmax(Q_i(s_t, ·))[a_t]
    L_AWAC = −log π(a_t | s_t) · exp(β (Q' − V(s_t)))
    loss   = L_Q + L_V + c_CQL · L_CQL + c_AWAC · L_AWAC

Snell et al. 2022, arXiv:2206.11871. An action is a completion token, its state all tokens before it. V is the
τ-expectile of Q' over the actions in the data (Kostrikov et al. 2021, arXiv:2110.06169, Eq. 5), so that Q is never evaluated
on actions outside the data; L_CQL lowers the Q of those (Kumar et al. 2020, arXiv:2006.04779); L_AWAC is the
advantage-weighted regression of the policy (Nair et al. 2020, arXiv:2006.09359). Target heads are a moving average of the Q
heads, θ' ← α θ + (1 − α) θ'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl.algorithms.signals import required
from trl.errors import DataError
from trl.ops.reduce import at_last
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.types import Learnable, Metrics, Scores


def place_rewards(reward: Tensor, mask: Tensor) -> Tensor:
    """Rewards of tokens `[N,C]`: rewards of completions `[N]` are put on the last action; `[N,C]` is only masked."""
    if reward.shape == mask.shape:
        return reward * mask
    if reward.shape != mask.shape[:1]:
        raise DataError(
            f"Rewards have shape {tuple(reward.shape)} for a mask of shape {tuple(mask.shape)}: give [N] or [N,C]."
        )
    return at_last(reward, mask)


@shapes(values="N C", mask="N C")
def next_values(values: Tensor, mask: Tensor) -> Tensor:
    """V(s_{t+1}) `[N,C]`: the value at the next unmasked token of the same completion; 0 after the last one."""
    width = mask.shape[1]
    places = torch.where(mask > 0, torch.arange(width, device=mask.device), width)
    following = places.flip(1).cummin(1).values.flip(1)  # the first action at or after t
    following = torch.cat([following[:, 1:], following.new_full((len(mask), 1), width)], 1)
    return torch.cat([values, values.new_zeros(len(values), 1)], 1).gather(1, following) * mask


@shapes(q="...", target="...")
def q_loss(q: Tensor, target: Tensor) -> Tensor:
    """(Q(s, a) − y)², `[N,C]`; no gradient through y, which is `target`."""
    return (q - target.detach()).square()


@shapes(values="...", q="...")
def expectile_loss(values: Tensor, q: Tensor, *, tau: float) -> Tensor:
    """|τ − 1[Q < V]| (Q − V)², `[N,C]`: minimal where V is the τ-expectile of Q. No gradient through Q."""
    difference = q.detach() - values
    return (tau - (difference < 0).to(difference.dtype)).abs() * difference.square()


@shapes(q="...", values="...")
def awac_weights(q: Tensor, values: Tensor, *, beta: float) -> Tensor:
    """exp(β (Q − V)), `[N,C]`, without gradient."""
    return torch.exp(beta * (q - values).detach())


@torch.no_grad()
def polyak_update(target: Sequence[Tensor], source: Sequence[Tensor], *, alpha: float) -> None:
    """θ' ← α θ + (1 − α) θ', in place; α = 1 copies. Both lists have parameters of the same shapes, `[I,J]` or any other."""
    torch._foreach_lerp_(list(target), list(source), alpha)


@dataclass(kw_only=True)
class ILQLOptions:
    """Hyperparameters of the loss; the trainer's configuration inherits them."""

    tau: float = 0.7
    """τ: V is the τ-expectile of Q. 0.5 is the mean; towards 1 it approaches the best action in the data."""

    gamma: float = 0.99
    """Discount of a token's later rewards."""

    cql_scale: float = 0.1
    """Weight of L_CQL, which lowers the Q of actions that are not in the data."""

    awac_scale: float = 1.0
    """Weight of L_AWAC, the loss of the policy."""

    beta: float = 0.0
    """β in the weights exp(β (Q' − V)) of the policy's loss. 0: all tokens weigh the same, as in supervised fine-tuning."""

    alpha: float = 0.001
    """α: step size of the target heads' moving average of the Q heads; 1 copies them."""

    steps_for_target_q_sync: int = 5
    """Optimizer steps between two updates of the target heads."""

    two_qs: bool = True
    """Train two Q heads and use the minimum of their target heads, against overestimation (arXiv:1802.09477)."""


@dataclass(kw_only=True)
class ILQL(ILQLOptions):
    """The ILQL loss as an algorithm.

    Scores it reads, `[N,C]`: `logprobs`, `value`, and of `extras` `q_i` = Q_i(s, a), `q_logprobs_i` = log softmax(Q_i)[a]
    for every Q head, and `target_q` = min_i Q'_i(s, a). Signal: `reward`, `[N]` or `[N,C]`.
    """

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def heads(self) -> int:
        """Number of Q heads."""
        return 2 if self.two_qs else 1

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """Loss `[N,C]` of every action, to be averaged over the mask, and metrics `[N,C]`."""
        assert scores.value is not None, "score the batch with the heads of a model that has them"
        mask, value, found = batch.mask, scores.value, scores.extras
        qs = [found[f"q_{i}"] for i in range(self.heads)]
        rewards = place_rewards(required(batch, "reward", by="ILQL"), mask)
        target = rewards + self.gamma * next_values(value, mask)
        weights = awac_weights(found["target_q"], value, beta=self.beta)
        terms = {
            "loss/q": sum(q_loss(q, target) for q in qs),
            "loss/v": expectile_loss(value, found["target_q"], tau=self.tau),
            "loss/cql": -sum(found[f"q_logprobs_{i}"] for i in range(self.heads)),
            "loss/awac": -scores.logprobs * weights,
        }
        scales = {"loss/cql": self.cql_scale, "loss/awac": self.awac_scale}
        loss = sum(scales.get(name, 1.0) * term for name, term in terms.items())
        measured = {f"qvalues/{i}": q for i, q in enumerate(qs)}
        measured |= {"values": value, "awac_weight": weights}
        return loss * mask, {name: tensor.detach() for name, tensor in (terms | measured).items()}
