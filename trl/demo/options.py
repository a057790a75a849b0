"""Options of `trl demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl.demo.reviews import SIZES
from trl.errors import ConfigError


@dataclass
class DemoArguments:
    """Models, length and output of the demo."""

    ALIASES: ClassVar[dict[str, str]] = {
        "reward_model_path": "reward_model_name_or_path",
        "reward_model": "reward_model_name_or_path",
    }

    model_name_or_path: str | None = None
    """Hub name or folder of a causal language model. None: a GPT-2 of 1.4 million parameters, trained from scratch."""

    reward_model_name_or_path: str | None = None
    """Hub name or folder of a sentiment classifier to use as reward. None: train a reward model in step 2."""

    positive_label: str | None = None
    """The classifier's label to reward, by name or number. None: the one named positive."""

    output_dir: str = "trl-demo"
    """Folder for the models and the report."""

    max_steps: int = -1
    """Maximum optimizer steps of each stage; −1 for the stage's default."""

    samples: int = 3
    """Number of samples to show before and after PPO."""

    judged: int = 200
    """Number of samples to judge before and after PPO."""

    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("judged", 1)):
            if not least <= getattr(self, name) <= SIZES["test"]:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: give {least} to {SIZES['test']}, the number of held-out reviews."
                )
        if self.positive_label is not None and self.reward_model_name_or_path is None:
            raise ConfigError(
                "positive_label is a label of the classifier reward_model_name_or_path: give that as well."
            )
