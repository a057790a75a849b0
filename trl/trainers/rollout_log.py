"""Logs of rollouts: their metrics, their completions, and the values that reward functions log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from trl.algorithms.advantages import SUM_THEN_NORMALIZE, has_no_variance
from trl.callbacks.completions import (
    CompletionLog,
    log_rows,
    means_of,
    one_per_prompt,
    rollout_metrics,
    write_completions,
)
from trl.rollouts.experience import Group
from trl.trainers.sampling import GroupSampler
from trl.training.collectives import all_gather_object, gather_rows
from trl.training.metrics import Meter
from trl.types import Experience

logger = logging.getLogger(__name__)

FLAT_IN_A_ROW = 5
"""Number of consecutive rollout batches in which no group's rewards differ, after which the log warns."""


class RolloutLog:
    """The rollouts of training, or of an evaluation, since the last log. All processes have to call every method."""

    def __init__(self, sampler: GroupSampler, mode: str, meter: Meter, accelerator: Accelerator) -> None:
        self.args, self.sampler, self.logged = sampler.args, sampler, sampler.logged[mode]
        self.meter, self.accelerator = meter, accelerator
        self.completions = CompletionLog()
        self.flat = 0

    def add(self, groups: Sequence[Group], experience: Experience, *, counted: bool = True) -> None:
        """Add a rollout batch's metrics, and keep its completions for the next log.

        With `counted=False`, only take part in the collective operations of the other processes.
        """
        names = [reward.name for reward in self.sampler.rewards]
        if self.args.multi_objective_aggregation != SUM_THEN_NORMALIZE:  # log the raw rewards, not the normalised ones
            experience = replace(experience, rewards=self.sampler.combined(groups, SUM_THEN_NORMALIZE))
        everywhere = self._gather_rewards(groups, experience)
        if not counted:
            return
        self._count_flat(experience)
        self.meter.add(rollout_metrics(groups, experience, names, everywhere))
        if self.args.log_completions:
            self.completions.add(log_rows(groups, experience, names))

    def _count_flat(self, experience: Experience) -> None:
        """Warn once if, in several rollout batches in a row, the rewards of no group differ."""
        compares = self.args.num_generations > 1 and self.logged is self.sampler.logged["train"]
        is_flat = compares and bool(has_no_variance(experience.rewards, experience.group).all())
        self.flat = self.flat + 1 if is_flat else 0
        if self.flat == FLAT_IN_A_ROW:
            names = ", ".join(reward.name for reward in self.sampler.rewards)
            logger.warning(
                f"In {FLAT_IN_A_ROW} rollout batches in a row, all completions of each prompt had the same reward ({names}), so "
                "nothing was learned from them (frac_reward_zero_std is 1). Look at the completions (log_completions=True), "
                "and try partial rewards, other prompts, a higher temperature or more num_generations."
            )

    def _gather_rewards(self, groups: Sequence[Group], experience: Experience) -> Tensor:
        """The combined reward and that of every function, `[M,1+F]`, of the M samples of all processes."""
        functions = torch.cat([group.rewards for group in groups])
        return gather_rows(torch.cat([experience.rewards[:, None], functions], 1), self.accelerator)[0]

    def take_logged(self) -> dict[str, float]:
        """Means, over all processes, of the numbers that reward functions have logged."""
        return means_of(all_gather_object(self.logged.take(), self.accelerator))

    def write(self, step: int, kind: str = "") -> None:
        """Gather the completions of all processes and write them, on the main one, to the subfolder `kind` of completions."""
        args = self.args
        if not args.log_completions:
            return
        rows = list(chain(*all_gather_object(self.completions.take(), self.accelerator)))
        if args.process_index == 0:
            rows = one_per_prompt(rows) if args.log_unique_prompts else rows
            folder = Path(args.output_dir) / "completions" / kind
            write_completions(rows, folder, step, show=args.num_completions_to_print, trackers=args.report_to)
