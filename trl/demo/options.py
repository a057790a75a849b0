"""Options of `trl demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl.demo.reviews import SIZES
from trl.errors import ConfigError


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

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("judged", 1)):
            if not least <= getattr(self, name) <= SIZES["test"]:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: give {least} to {SIZES['test']}, the held-out reviews."
                )
        if self.positive_label is not None and self.reward_model_name_or_path is None:
            raise ConfigError("positive_label names a label of reward_model_name_or_path: give that as well.")
