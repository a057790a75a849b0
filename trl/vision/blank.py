"""A blank image for batches without one, where processes have to run the image encoder together.

    states + 0 · Σ encoder(blank image)

FSDP2 and ZeRO-3 gather an encoder's weights as it runs, and DDP waits for all its gradients: a process that skips it, since
its texts have no images, leaves the others waiting. The image is an input of the batch, so policy and reference both read it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, distributed
from transformers import PreTrainedModel

from trl.types import Concatenated
from trl.vision.processing import ImageProcessing

PREFIX = "blank_"
"""Begins the names of the inputs that are a blank image's."""


def blank_image(processing: ImageProcessing) -> dict[str, Tensor]:
    """What an image encoder reads of a small white image, as inputs of a batch."""
    values, _ = processing.processed([Image.new("RGB", processing.trial_size(), "white")])
    joins = processing.family.joins
    own = {name: torch.as_tensor(v) for name, v in values.items() if isinstance(joins.get(name), Concatenated)}
    return {PREFIX + name: value for name, value in own.items()}


def runs_together() -> bool:
    """Whether there are other processes."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def read_blank(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Tensor | float]]:
    """The other inputs of a forward; and, to be asked for after it, 0 times what the encoder makes of a blank image, if there is one.

    The encoder runs when tokens have been embedded, as it does for images: processes gather weights in one order.
    """
    own = {name.removeprefix(PREFIX): value for name, value in inputs.items() if name.startswith(PREFIX)}
    if not own:
        return inputs, lambda: 0.0
    found: list[Tensor] = []

    def encode(*_: Any) -> None:
        handle.remove()
        known = inspect.signature(model.base_model.get_image_features).parameters
        arguments = {name: value for name, value in own.items() if name in known}
        out = model.base_model.get_image_features(**arguments, return_dict=True).pooler_output
        found.extend([out] if isinstance(out, Tensor) else out)

    handle = model.get_input_embeddings().register_forward_hook(encode)
    return {n: v for n, v in inputs.items() if not n.startswith(PREFIX)}, lambda: 0 * sum(each.sum() for each in found)
