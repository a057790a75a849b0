"""Rejection-sampling fine-tuning with a rising threshold: fine-tune the policy on the best of its own samples.

    p_k    = p_start + (p_end − p_start) · k / (n − 1)         in improvement step k = 0 … n − 1
    q_x    = quantile_{p_k} {r(x, y)}                          of every prompt x
    t_x    = clip(q_x, min_x q_x + ε, max_x q_x − ε)           its threshold; ε = 10⁻³
    kept   = {(x, y) : r(x, y) ≥ t_x}, each text once
    loss   = −log π(y | x)                                     see `trl.algorithms.sft`

One round of samples serves n improvement steps, as in ReST (Gulcehre et al. 2023, arXiv:2308.08998), with best-of-n
selection as in RAFT (Dong et al. 2023, arXiv:2304.06767). Where rewards take few values, the clip drops prompts whose samples
all have the lowest reward, and keeps those whose samples all have the highest.
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
"""ε: distance that thresholds keep from the lowest and from the highest quantile of all prompts."""


@shapes(rewards="N", group="N")
def thresholds(rewards: Tensor, group: Tensor, p: float) -> Tensor:
    """Threshold t_x of every prompt, `[G]`, from rewards `[N]` and prompt indices `group [N]` (0 … G − 1).

    NaN rewards are left out; a prompt without any reward has threshold +∞.
    """
    members = [rewards[(group == g) & ~rewards.isnan()].double() for g in range(int(group.max()) + 1)]
    quantiles = torch.stack([each.quantile(p) if len(each) else each.new_tensor(torch.inf) for each in members])
    known = quantiles[quantiles.isfinite()]
    if not len(known):
        return quantiles
    return torch.where(quantiles.isfinite(), quantiles.clamp(known.min() + MARGIN, known.max() - MARGIN), quantiles)


@shapes(rewards="N", group="N")
def reached(rewards: Tensor, group: Tensor, p: float) -> Tensor:
    """True `[N]` for samples whose reward is at or above the threshold of their prompt at percentile `p`."""
    return rewards.double() >= thresholds(rewards, group, p)[group]


def first_of_each(identity: Sequence[Hashable], candidates: Sequence[bool]) -> list[bool]:
    """Drop candidates whose identity repeats that of an earlier candidate."""
    seen: set[Hashable] = set()
    kept = []
    for each, is_candidate in zip(identity, candidates, strict=True):
        kept.append(is_candidate and each not in seen)
        seen |= {each} if is_candidate else set()
    return kept


@dataclass(kw_only=True)
class RFTOptions:
    """Hyperparameters of the selection; the trainer's configuration inherits them."""

    start_percentile: float = 0.7
    """Percentile of a prompt's rewards, 0 to 1, that a sample must reach to be kept in the first improvement step."""

    end_percentile: float = 0.95
    """The same percentile in the last improvement step on the same samples."""

    n_improve_steps: int = 4
    """Number of improvement steps on the same samples, before new ones are drawn."""

    def check_options(self) -> None:
        """Raises ConfigError for options out of range."""
        check_bounds(self)
        if self.start_percentile > self.end_percentile:
            raise ConfigError(
                f"start_percentile={self.start_percentile} is above end_percentile={self.end_percentile}: swap them."
            )

    def percentile(self, step: int) -> float:
        """p_k for k = `step` modulo `n_improve_steps`; `step` counts improvement steps of the whole run from 0."""
        steps = self.n_improve_steps
        share = step % steps / (steps - 1) if steps > 1 else 0.0
        return self.start_percentile + (self.end_percentile - self.start_percentile) * share


@dataclass(kw_only=True)
class RFT(RFTOptions, Algorithm):
    """RFT as an algorithm of an online trainer. Adds the signal `reached` `[N]`: 1 for samples at the threshold, else 0."""

    step: int = 0
    """Number of improvement steps before this one."""

    def __post_init__(self) -> None:
        self.check_options()

    def advantages(self, experience: Experience) -> Experience:
        """Add the signal `reached`, for the percentile of this step."""
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
        """−log π `[N,C]` of the kept completions, and metrics."""
        return sft.nll(scores), sft.metrics(scores)
