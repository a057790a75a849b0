"""Rejection-sampling fine-tuning with a rising threshold: learn to imitate the best of one's own samples.

    p_k    = p_start + (p_end − p_start) · k / (n − 1)         in improvement step k = 0 … n − 1
    q_x    = quantile_{p_k} {r(x, y)}                          of every prompt x
    t_x    = clip(q_x, min_x q_x + ε, max_x q_x − ε)           its threshold; ε = 10⁻³
    kept   = {(x, y) : r(x, y) ≥ t_x}, each text once
    loss   = −log π(y | x)                                     see `trl.algorithms.sft`

Sampling is done once for n improvement steps (grow and improve: ReST, Gulcehre et al. 2023, arXiv:2308.08998); best-of-n
fine-tuning as in RAFT (Dong et al. 2023, arXiv:2304.06767). The clip leaves out the prompts that are all bad where rewards
take few values, and never all samples of those that are all good.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trl.algorithms import sft
from trl.errors import ConfigError
from trl.ops.shapes import shapes
from trl.option_bounds import check_bounds
from trl.types import Algorithm, Experience, Learnable, Metrics, Scores

MARGIN = 1e-3
"""ε: how far the thresholds of prompts stay from the lowest and the highest of their quantiles."""


@shapes(rewards="N", group="N")
def thresholds(rewards: Tensor, group: Tensor, p: float) -> Tensor:
    """The threshold `[G]` of every prompt, from rewards `[N]` and the prompt `group [N]` (0 … G − 1) that each belongs to.

    A NaN is no reward and is left out; a prompt without any reward has the threshold +∞.
    """
    count = int(group.max()) + 1 if len(group) else 0
    members = [rewards[(group == g) & ~rewards.isnan()].double() for g in range(count)]
    quantiles = torch.stack([each.quantile(p) if len(each) else each.new_tensor(torch.inf) for each in members])
    known = quantiles[quantiles.isfinite()]
    if not len(known):
        return quantiles
    return torch.where(quantiles.isfinite(), quantiles.clamp(known.min() + MARGIN, known.max() - MARGIN), quantiles)


@shapes(rewards="N", group="N")
def reached(rewards: Tensor, group: Tensor, p: float) -> Tensor:
    """Which samples `[N]` bool are at the threshold of their prompt at percentile `p`, or above."""
    return rewards.double() >= thresholds(rewards, group, p)[group]


def first_of_each(identity: Sequence[Hashable], candidates: Sequence[bool]) -> list[bool]:
    """The candidates less those that repeat an earlier one."""
    seen: set[Hashable] = set()
    kept = []
    for each, is_candidate in zip(identity, candidates, strict=True):
        kept.append(is_candidate and each not in seen)
        seen |= {each} if is_candidate else set()
    return kept


@dataclass(kw_only=True)
class RFTOptions:
    """What the selection is tuned by. A trainer's configuration has these options too."""

    start_percentile: float = 0.7
    """Percentile of a prompt's rewards that its samples have to reach in the first improvement step, 0 to 1."""

    end_percentile: float = 0.95
    """The same percentile in the last improvement step, before new samples are drawn."""

    n_improve_steps: int = 4
    """Improvement steps for which the same samples are selected from."""

    def check_options(self) -> None:
        """Raises ConfigError for options out of range."""
        check_bounds(self)
        if self.start_percentile > self.end_percentile:
            raise ConfigError(
                f"start_percentile={self.start_percentile} is above end_percentile={self.end_percentile}: the threshold rises."
            )

    def percentile(self, step: int) -> float:
        """p_k of improvement step k = `step`, counted from 0 over the whole run; with one step of improvement, the first one."""
        steps = self.n_improve_steps
        share = step % steps / (steps - 1) if steps > 1 else 0.0
        return self.start_percentile + (self.end_percentile - self.start_percentile) * share


@dataclass(kw_only=True)
class RFT(RFTOptions, Algorithm):
    """The method as an algorithm of an online trainer: `advantages` adds the signal `reached` `[N]`, 1 or 0."""

    step: int = 0
    """Improvement steps that were made before this one."""

    def __post_init__(self) -> None:
        self.check_options()

    def advantages(self, experience: Experience) -> Experience:
        """The experience with `reached`, at the percentile of this step."""
        found = reached(experience.rewards, experience.group, self.percentile(self.step))
        return experience.with_signals(reached=found.to(experience.mask.dtype))

    def after_round(self, experience: Experience) -> RFT:
        """The algorithm of the next improvement step."""
        return replace(self, step=self.step + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]

    def loss(self, scores: Scores, batch: Learnable) -> tuple[Tensor, Metrics]:
        """−log π `[N,C]` of what is kept, and metrics."""
        return sft.nll(scores), sft.metrics(scores, batch)
