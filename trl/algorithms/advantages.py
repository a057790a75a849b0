"""Advantages of whole completions from their rewards, relative to the other samples of their prompt or of the rollout batch.

    A_i = (r_i − b_i) / s_i

baseline b    "group"           mean of the group                         GRPO, arXiv:2402.03300, section 4.1.2
              "leave_one_out"   mean of the other samples of the group    RLOO, arXiv:2402.14740, Eq. 8
              "batch"           mean of the rollout batch                 REINFORCE
              "none"            0
scale s       "group"           standard deviation of the group + ε       GRPO
              "batch"           st. dev. of the rollout batch + ε         REINFORCE++, arXiv:2501.03262; arXiv:2508.08221
              "mean"            mean of the group, rewards ≥ 0            MaxRL, arXiv:2602.02710
              "none"            1                                         Dr. GRPO, arXiv:2503.20783

A group is all samples of one prompt. Standard deviations have Bessel's correction. Rewards that are NaN (no reward function
applied) are left out of every statistic, and their advantage is 0. Where all rewards of a group are equal, its advantages are
0 under "group" and "leave_one_out", and it gives no gradient. Advantages are computed in float64, in which sums of equal
float32 numbers are exact, so that these are exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from trl.ops.shapes import shapes

EPSILON = 1e-4


@shapes(group="N")
def group_index(group: Tensor) -> Tensor:
    """Renumber the group ids `[N]` as consecutive integers 0, 1, 2, …"""
    return torch.unique(group, return_inverse=True)[1]


@shapes(values="N", group="N")
def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """Sum of the values of each sample's group, `[N]`; NaN are left out."""
    index = group_index(group)
    sums = values.new_zeros(len(values)).index_add(0, index, values.nan_to_num())
    return sums[index]


@shapes(values="N", group="N")
def group_count(values: Tensor, group: Tensor) -> Tensor:
    """Number of values that are not NaN in each sample's group, `[N]`."""
    return group_sum((~values.isnan()).to(values.dtype), group)


@shapes(values="N", group="N")
def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean of the values of each sample's group, `[N]`; NaN are left out."""
    return group_sum(values, group) / group_count(values, group).clamp(min=1)


@shapes(values="N", group="N")
def group_std(values: Tensor, group: Tensor) -> Tensor:
    """Standard deviation of the values of each sample's group, `[N]`; NaN are left out, and it is 0 in a group of one."""
    squares = (values - group_mean(values, group)).square()
    return (group_sum(squares, group) / (group_count(values, group) - 1).clamp(min=1)).sqrt()


def _leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    others = group_count(rewards, group) - 1
    return torch.where(others > 0, (group_sum(rewards, group) - rewards) / others.clamp(min=1), rewards)


def _whole(statistic: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Apply a per-group statistic to the whole rollout batch, as if it were one group."""
    return lambda rewards, group: statistic(rewards, torch.zeros_like(group))


Baseline = Literal["group", "leave_one_out", "batch", "none"]
Scale = Literal["group", "batch", "mean", "none"]

BASELINES: dict[Baseline, Callable[[Tensor, Tensor], Tensor]] = {
    "group": group_mean,
    "leave_one_out": _leave_one_out,
    "batch": _whole(group_mean),
    "none": lambda rewards, group: torch.zeros_like(rewards),
}

SCALES: dict[Scale, Callable[[Tensor, Tensor], Tensor]] = {
    "group": lambda rewards, group: group_std(rewards, group) + EPSILON,
    "batch": lambda rewards, group: _whole(group_std)(rewards, group) + EPSILON,
    "mean": lambda rewards, group: group_mean(rewards, group).clamp(min=EPSILON),
    "none": lambda rewards, group: torch.ones_like(rewards),
}


@shapes(rewards="N", group="N")
def advantages(rewards: Tensor, group: Tensor, *, baseline: Baseline, scale: Scale) -> Tensor:
    """Advantages A `[N]` from rewards `[N]` and group ids `[N]`; for the names see `BASELINES` and `SCALES`."""
    exact = rewards.double()
    centred = exact - BASELINES[baseline](exact, group)
    return (centred / SCALES[scale](exact, group)).nan_to_num().to(rewards.dtype)


@shapes(rewards="N", group="N")
def has_no_variance(rewards: Tensor, group: Tensor) -> Tensor:
    """True `[N]` where all known rewards of the sample's group are equal, or none is known."""
    return group_std(rewards.double(), group) <= 1e-8 * (1 + group_mean(rewards.double(), group).abs())


RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]
SUM_THEN_NORMALIZE, NORMALIZE_THEN_SUM = get_args(RewardAggregation)


@shapes(rewards="N F", weights="F", group="N")
def combine_rewards(rewards: Tensor, weights: Tensor, group: Tensor, *, aggregation: RewardAggregation) -> Tensor:
    """Combine the rewards of F functions `[N,F]`, with weights `[F]`, into one `[N]`; NaN where no function applied.

    "sum_then_normalize"   Σ_f w_f r_f
    "normalize_then_sum"   Σ_f w_f (r_f − mean_g) / (std_g + ε), normalise each function within its group, so that none
                           drowns the others (GDPO, arXiv:2601.05242, Eq. 4); use `scale="batch"` for the advantages then
    """
    if aggregation == NORMALIZE_THEN_SUM:
        columns = [(r - group_mean(r, group)) / (group_std(r, group) + EPSILON) for r in rewards.double().unbind(1)]
        rewards = torch.stack(columns, 1).to(rewards.dtype)
    total = (rewards * weights).nan_to_num().sum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)
