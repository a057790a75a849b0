"""Trainers and pipelines by name."""

from __future__ import annotations

from typing import Any

from trl.errors import ConfigError
from trlx.pipeline import PIPELINES
from trlx.trainer import TRAINERS

NEMO = ("nemoppotrainer", "nemoilqltrainer", "nemosfttrainer")


def get_trainer(name: str) -> Any:
    """The trainer's class, whatever the capitals of its name. Raises ConfigError for one that is not there."""
    if str(name).lower() in NEMO:
        raise ConfigError(
            f"{name} is not here: NeMo's trainers are replaced by {name.replace('NeMo', 'Accelerate')}, which trains large "
            "models in shards by FSDP or ZeRO."
        )
    return TRAINERS.get(name)


get_pipeline = PIPELINES.get
"""The pipeline's class, whatever the capitals of its name. Raises ConfigError for one that is not there."""
