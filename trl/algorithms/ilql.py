"""Implicit language Q-learning: offline reinforcement learning from samples and their rewards.

    y_t    = r_t + γ V(s_{t+1})                      V = 0 after the last action; no gradient
    L_Q    = Σ_i (Q_i(s_t, a_t) − y_t)²
    L_V    = |τ − 1[Q' < V]| (Q' − V(s_t))²          Q' = min_i Q'_i(s_t, a_t), of the target heads
    L_CQL  = −Σ_i log softmax(Q_i(s_t, ·))[a_t]
    L_AWAC = −log π(a_t | s_t) · exp(β (Q' − V(s_t)))
    loss   = L_Q + L_V + c_CQL · L_CQL + c_AWAC · L_AWAC

Snell et al. 2022, arXiv:2206.11871. An action is a token that the policy is responsible for, its state all tokens before
it. V is the τ-expectile of Q' over the actions in the data (Kostrikov et al. 2021, arXiv:2110.06169, Eq. 5), so that no
action outside the data is ever asked for; L_CQL keeps their Q below (Kumar et al. 2020, arXiv:2006.04779); L_AWAC is the
advantage-weighted regression of the policy (Nair et al. 2020, arXiv:2006.09359). Target heads follow by θ' ← α θ + (1 − α) θ'.
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
    """Rewards `[N,C]`: those of completions `[N]` go to their last action, those of tokens `[N,C]` stay where they are."""
    if reward.shape == mask.shape:
        return reward * mask
    if reward.shape != mask.shape[:1]:
        raise DataError(f"Rewards are [N] or [N,C], with a mask {tuple(mask.shape)} they are {tuple(reward.shape)}.")
    return at_last(reward, mask)


@shapes(values="N C", mask="N C")
def next_values(values: Tensor, mask: Tensor) -> Tensor:
    """V(s_{t+1}) `[N,C]`: the value `[N,C]` at the next action of the same completion, zero after the last one."""
    width = mask.shape[1]
    places = torch.where(mask > 0, torch.arange(width, device=mask.device), width)
    following = places.flip(1).cummin(1).values.flip(1)  # the first action at or after t
    following = torch.cat([following[:, 1:], following.new_full((len(mask), 1), width)], 1)
    return torch.cat([values, values.new_zeros(len(values), 1)], 1).gather(1, following) * mask


@shapes(q="...", target="...")
def q_loss(q: Tensor, target: Tensor) -> Tensor:
    """(Q(s, a) − y)², `[N,C]`; y is held constant."""
    return (q - target.detach()).square()


@shapes(values="...", q="...")
def expectile_loss(values: Tensor, q: Tensor, *, tau: float) -> Tensor:
    """|τ − 1[Q < V]| (Q − V)², `[N,C]`: least where V is the τ-expectile of Q, which is held constant."""
    difference = q.detach() - values
    return (tau - (difference < 0).to(difference.dtype)).abs() * difference.square()


@shapes(q="...", values="...")
def awac_weights(q: Tensor, values: Tensor, *, beta: float) -> Tensor:
    """exp(β (Q − V)), `[N,C]`, without gradient."""
    return torch.exp(beta * (q - values).detach())


@torch.no_grad()
def polyak_update(target: Sequence[Tensor], source: Sequence[Tensor], *, alpha: float) -> None:
    """θ' ← α θ + (1 − α) θ', in place; α = 1 copies. Lists of parameters, `[I,J]` or of any other shape, the same in both."""
    torch._foreach_lerp_(list(target), [tensor.detach() for tensor in source], alpha)


@dataclass(kw_only=True)
class ILQLOptions:
    """What the loss is tuned by. A trainer's configuration has these options too."""

    tau: float = 0.7
    """τ of the expectile that V is of Q: 0.5 is the mean, towards 1 the best action in the data."""

    gamma: float = 0.99
    """Discount of a token's later rewards."""

    cql_scale: float = 0.1
    """Weight of L_CQL, which keeps the Q of actions that are not in the data low."""

    awac_scale: float = 1.0
    """Weight of L_AWAC, the loss of the policy."""

    beta: float = 0.0
    """β in the weights exp(β (Q' − V)) of the policy's loss. 0: every token weighs the same, as in fine-tuning."""

    alpha: float = 0.001
    """α of a step of the target heads towards the Q heads; 1 copies them."""

    steps_for_target_q_sync: int = 5
    """Optimizer steps between two steps of the target heads."""

    two_qs: bool = True
    """Learn two Q and take the smaller of their targets, against overestimation (arXiv:1802.09477)."""


@dataclass(kw_only=True)
class ILQL(ILQLOptions):
    """The loss as an object.

    Scores it reads `[N,C]`: `logprobs`, `value`, and of `extras` `q_i` = Q_i(s, a), `q_logprobs_i` = log softmax(Q_i)[a]
    for every Q, and `target_q` = min_i Q'_i(s, a). Signal: `reward`, `[N]` or `[N,C]`.
    """

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def heads(self) -> int:
        """How many Q there are."""
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
