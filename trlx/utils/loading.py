"""Look up trainers and pipelines by name."""

from __future__ import annotations

from typing import Any

from trl.errors import ConfigError
from trlx.pipeline import PIPELINES
from trlx.trainer import TRAINERS

NEMO = ("nemoppotrainer", "nemoilqltrainer", "nemosfttrainer")


def get_trainer(name: str) -> Any:
    """Class of a trainer; its name is case-insensitive. Raises ConfigError for an unknown name."""
    if str(name).lower() in NEMO:
        raise ConfigError(
            f"{name} is not supported: use {name.replace('NeMo', 'Accelerate')}, with FSDP or ZeRO to train large models in "
            "shards."
        )
    return TRAINERS.get(name)


get_pipeline = PIPELINES.get
"""Class of a pipeline; its name is case-insensitive. Raises ConfigError for an unknown name."""
