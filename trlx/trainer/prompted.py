"""Trainers of `trl` that sample, with prompts that were tokenised beforehand, and options of sampling of this interface."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset

from trl.rollouts.sampling import SamplingParams
from trl.trainers.sampling import SamplingTrainer


class Prompted(SamplingTrainer):
    """A sampling trainer whose rows have `prompt_ids`. `params` says how samples are drawn in training."""

    def __init__(self, *args: Any, params: SamplingParams, **kwargs: Any) -> None:
        self.params = params
        super().__init__(*args, **kwargs)

    def sampling_params(self, mode: str) -> SamplingParams:
        """How to sample next, with the seed that is due."""
        due = super().sampling_params(mode)
        return replace(self.params, seed=due.seed)

    def encode(self, rows: Dataset, split: str, name: str) -> Dataset:
        """The rows as they are."""
        self._columns[split] = rows.column_names
        return rows
