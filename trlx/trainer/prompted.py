"""Trainers of `trl` that sample, with prompts that were tokenised beforehand, and options of sampling of this interface."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset

from trl.rollouts.sampling import SamplingParams
from trl.trainers.online import OnlineTrainer
from trl.trainers.sampling import GroupSampler


class PromptedSampler(GroupSampler):
    """Draws samples as `params` say, with the seed that is due."""

    params: SamplingParams

    def _sampling_params(self, mode: str) -> SamplingParams:
        return replace(self.params, seed=super()._sampling_params(mode).seed)


class Prompted(OnlineTrainer):
    """An online trainer whose rows have `prompt_ids`. `params` says how samples are drawn in training."""

    sampler_class = PromptedSampler

    def __init__(self, *args: Any, params: SamplingParams, **kwargs: Any) -> None:
        self.params = params
        super().__init__(*args, **kwargs)

    def _prepare_sampling(self, *args: Any) -> None:
        super()._prepare_sampling(*args)
        self.sampler.params = self.params

    def encode(self, rows: Dataset, split: str, name: str) -> Dataset:
        """The rows as they are."""
        self._columns[split] = rows.column_names
        return rows
