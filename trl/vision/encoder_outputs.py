"""Features of images as an input of batches, and as what forwards of `transformers` take in the place of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

FEATURES = "image_features"
"""Input of an example: `[T,H]` for models that keep a list of each image's features, `[T,1,H]` for those of one tensor."""

DEEPSTACK = "image_features_of_layer_{}"
"""Inputs `[T,H]`: features that are added to the states of the first layers (arXiv:2406.04334)."""


def with_encoder_outputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward, with features as what the image encoder would have given."""
    if FEATURES not in inputs:
        return dict(inputs)
    own = {name: value for name, value in inputs.items() if name.startswith(FEATURES)}
    out = BaseModelOutputWithPooling(pooler_output=_as_given(own.pop(FEATURES)))
    if own:
        out.deepstack_features = [_as_given(own[DEEPSTACK.format(layer)]) for layer in range(len(own))]
    rest = {name: value for name, value in inputs.items() if not name.startswith(FEATURES)}
    return {**rest, "mm_encoder_outputs": {"image": out}}


def _as_given(features: Tensor) -> Tensor | tuple[Tensor]:
    return features if features.dim() == 3 else (features,)
