"""Pipelines, which provide prompts, and their registry by name."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from trlx.utils.registry import Registry

PIPELINES = Registry("pipeline", {"PromptPipeline": "trlx.pipeline.offline_pipeline"})


register_datapipeline = PIPELINES.register
"""Decorator that registers a pipeline class, under its own name or a given one."""


class BasePipeline(Dataset):
    """Rows of prompts: `pipeline[i]` is a dict with `prompt`, and other columns, which reward functions get."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError
