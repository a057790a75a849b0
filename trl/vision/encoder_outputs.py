"""Image features as inputs of a batch, and their conversion to the argument that `transformers` takes in place of pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

FEATURES = "image_features"
"""Name of the input: `[T,H]` for models whose encoder returns a list with the features of each image, `[T,1,H]` for others."""

DEEPSTACK = "image_features_of_layer_{}"
"""Names of the inputs `[T,H]` that are added to the hidden states of the first layers (arXiv:2406.04334)."""


def with_encoder_outputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model's forward, in which image features take the form of the image encoder's output."""
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
