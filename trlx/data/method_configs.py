"""The configuration of a method, and the registry that finds it by name."""

from __future__ import annotations

from dataclasses import dataclass

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


register_method, get_method = METHODS.register, METHODS.get
"""A decorator for a `MethodConfig` of one's own, by its name or the one that it is given; and the class of a name."""
