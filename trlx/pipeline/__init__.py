"""Where prompts come from: pipelines by name."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from trlx.utils.registry import Registry

PIPELINES = Registry("pipeline", {"PromptPipeline": "trlx.pipeline.offline_pipeline"})


register_datapipeline = PIPELINES.register
"""A decorator that makes a pipeline of one's own known by its name, or by the one that it is given."""


class BasePipeline(Dataset):
    """Rows of prompts: `pipeline[i]` is a dict with `prompt`, and whatever reward functions are given with it."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError
