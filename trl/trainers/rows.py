"""Collates examples into a batch for one model, with the options of `lay_out` that the model and its device require."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedModel

from trl.data.layout import lay_out
from trl.models.graphs import captures
from trl.models.image_features import ImageFeatures
from trl.models.rotary import length_dependent
from trl.models.varlen import VARLEN
from trl.types import Batch, Example
from trl.vision.blank import blank_image, runs_together
from trl.vision.encoder_outputs import FEATURES
from trl.vision.families import check_image_tokens, image_token_ids, joins_of
from trl.vision.processing import ImageProcessing


@dataclass
class RowsOfModel:
    """Lays examples out for a decoder or classifier.

    images      reads images; None for models that read text alone
    features    the cache of image features; None if the image encoder runs in every forward pass
    device      type of the device: "cpu", "cuda", …
    multiple    the width of a batch is padded to a multiple of this
    """

    model: PreTrainedModel
    images: ImageProcessing | None
    features: ImageFeatures | None
    device: str
    multiple: int

    def __call__(self, examples: Sequence[Example], layout: str, *, counts_copies: bool) -> Batch:
        """Lay prompts and completions out in `layout`. Raises DataError for image tokens without an image."""
        check_image_tokens(examples, image_token_ids(self.model.config))
        if self.features is not None:
            examples = self.features.of(examples)
        batch = lay_out(examples, layout, **self._options, counts_copies=counts_copies)
        has_images = {"pixel_values", FEATURES} & batch.inputs.keys()
        if self.images is None or has_images or not runs_together():
            return batch
        return replace(batch, inputs={**batch.inputs, **blank_image(self.images)})

    @cached_property
    def _options(self) -> dict[str, Any]:
        """Arguments of `lay_out`."""
        config = self.model.config
        text = config.get_text_config()
        spans = config._attn_implementation == VARLEN
        return {
            # Any token will do but the model's padding token, which models warn about when they get no attention mask.
            "pad_token_id": 1 if vars(text).get("pad_token_id") == 0 else 0,
            # Flash attention skips masked blocks, so a single long row is fastest.
            "capacity": 2**62 if spans or "flash" in config._attn_implementation else None,
            "hidden_size": text.hidden_size,
            "device": self.device,
            "multiple_of": self.multiple,
            "joins": joins_of(config),
            "spans": spans,
            "in_few_shapes": partial(captures, self.model),
            "restarts": bool(length_dependent(config)),
        }
