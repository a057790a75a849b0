"""Base class of the methods' configurations, and their registry by name."""

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
    """Options of a method."""

    name: str = ""
    """Name of the registered class."""


register_method, get_method = METHODS.register, METHODS.get
"""`register_method` is a decorator that registers a subclass of `MethodConfig`; `get_method` returns the class of a name."""
