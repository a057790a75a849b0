"""Online trainers of `trl` with pre-tokenised prompts and explicit sampling parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset

from trl.rollouts.sampling import SamplingParams
from trl.trainers.online import OnlineTrainer
from trl.trainers.sampling import GroupSampler


class PromptedSampler(GroupSampler):
    """Samples with the parameters `params`, and the seed of the current rollout batch."""

    params: SamplingParams

    def _sampling_params(self, mode: str) -> SamplingParams:
        return replace(self.params, seed=super()._sampling_params(mode).seed)


class Prompted(OnlineTrainer):
    """Online trainer whose rows have `prompt_ids`. `params` are the sampling parameters of training."""

    sampler_class = PromptedSampler

    def __init__(self, *args: Any, params: SamplingParams, **kwargs: Any) -> None:
        self.params = params
        super().__init__(*args, **kwargs)

    def _prepare_sampling(self, *args: Any) -> None:
        super()._prepare_sampling(*args)
        self.sampler.params = self.params

    def encode(self, rows: Dataset, split: str, name: str) -> Dataset:
        """Return the rows unchanged, since they are tokenised already."""
        self._columns[split] = rows.column_names
        return rows
