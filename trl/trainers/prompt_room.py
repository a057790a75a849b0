"""Warns of prompts that leave too little of the model's context for completions."""

from __future__ import annotations

import logging

import pyarrow.compute as pc
from datasets import Dataset

from trl.trainers.arguments import Rows

logger = logging.getLogger(__name__)


def warn_of_short_room(rows: Rows, name: str, context: int | None, wanted: int | None) -> None:
    """Warn how many of the encoded prompts leave fewer than `wanted` tokens of the model's `context` for completions."""
    if context is None or wanted is None or not isinstance(rows, Dataset):
        return
    sizes = pc.list_value_length(rows.select_columns("prompt_ids").with_format("arrow")[:]["prompt_ids"])
    if short := pc.sum(pc.greater(sizes, context - wanted)).as_py():
        logger.warning(
            f"{name}: {short:,} of {len(rows):,} prompts leave less than max_completion_length={wanted:,} of the model's "
            f"context of {context:,} tokens, the longest {context - pc.max(sizes).as_py():,}: completions are cut there. Set "
            "max_prompt_length, or a smaller max_completion_length."
        )
