"""Options of `trl demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class DemoArguments:
    """What the demo runs on, and how much of it is shown."""

    ALIASES: ClassVar[dict[str, str]] = {
        "reward_model_path": "reward_model_name_or_path",
        "reward_model": "reward_model_name_or_path",
    }

    model_name_or_path: str | None = None
    """Hub name or folder of a causal language model. None: a GPT-2 of 1.4 million parameters, made on the spot."""

    reward_model_name_or_path: str | None = None
    """Hub name or folder of a sentiment classifier that rewards. None: a reward model is trained in step 2."""

    positive_label: str | None = None
    """The classifier's label that is rewarded, by name or number. None: the one that is called positive."""

    output_dir: str = "trl-demo"
    """Where models and the report go."""

    max_steps: int = -1
    """Optimizer steps of each stage at most; −1 for as many as it takes."""

    samples: int = 3
    """Samples to show before and after."""

    judged: int = 200
    """Samples to judge before and after."""

    seed: int = 0
    """Seed of every random choice."""
