"""The configuration of a method, and the registry that finds it by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trlx.data.sections import Section
from trlx.utils.registry import Registry

METHODS = Registry(
    "method",
    {
        "PPOConfig": "trlx.models.modeling_ppo",
        "ILQLConfig": "trlx.models.modeling_ilql",
        "SFTConfig": "trlx.trainer.accelerate_sft_trainer",
        "RFTConfig": "trlx.trainer.accelerate_rft_trainer",
    },
)


@dataclass
class MethodConfig(Section):
    """Options of a method; `name` says which it is."""

    name: str = ""
    """Name of the class, whose options the others are."""


def register_method(name: Any = None) -> Any:
    """Make a `MethodConfig` of one's own known by its name, or by `name`: a decorator, with or without."""
    return METHODS.register(name)


def get_method(name: str) -> type[MethodConfig]:
    """The configuration class `name`, whatever its capitals. Raises ConfigError for one that is not there."""
    return METHODS.get(name)
