"""A blank image for batches without images, since all processes have to run the image encoder equally often.

    states + 0 · Σ encoder(blank image)

FSDP2 and ZeRO-3 gather the encoder's weights when it runs, and DDP waits for its gradients: a process that skips the encoder,
because its batch has no images, would make the others hang. The blank image is an input of the batch, so that policy and
reference both encode it.
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
"""Prefix of the names of a blank image's inputs."""


def blank_image(processing: ImageProcessing) -> dict[str, Tensor]:
    """The inputs of the image encoder for a small white image, for a batch."""
    values, _ = processing.processed([Image.new("RGB", processing.trial_size(), "white")])
    joins = processing.family.joins
    own = {name: torch.as_tensor(v) for name, v in values.items() if isinstance(joins.get(name), Concatenated)}
    return {PREFIX + name: value for name, value in own.items()}


def runs_together() -> bool:
    """Whether there are several processes."""
    return distributed.is_initialized() and distributed.get_world_size() > 1


def read_blank(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Tensor | float]]:
    """Split off the blank image's inputs. Return the other inputs, and a function for 0 · Σ encoder(blank image).

    Call the function after the forward pass; it gives 0 if there is no blank image. The encoder runs after the token embeddings,
    as it does for real images, so that all processes gather weights in the same order.
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
