"""What multimodal architectures are given beside tokens, as data: one entry per architecture.

A model whose forward has arguments of its own is made known by an entry for its `model_type`:

    FAMILIES["my_model"] = Family(joins={"token_bias": PerToken()})

and rows then bring the values along in a column `inputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from transformers import PreTrainedConfig

from trl.types import Join


@dataclass(frozen=True)
class Family:
    """What the models of an architecture read beside tokens.

    joins   how each input of several prompts is joined, by the name of the forward's argument
    """

    joins: Mapping[str, Join] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {}
"""Families by the `model_type` of the configuration."""

_NOTHING: Mapping[str, Join] = MappingProxyType({})


def joins_of(config: PreTrainedConfig) -> Mapping[str, Join]:
    """How inputs are joined for models of this configuration; empty where nothing is known of them."""
    family = FAMILIES.get(config.model_type)
    return _NOTHING if family is None else family.joins
