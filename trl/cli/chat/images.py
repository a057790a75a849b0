"""Images in a conversation: parts of a message with a path, and what models and servers are given in their place."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl.types import Example, PerToken
from trl.vision.images import PixelLimits, read_image
from trl.vision.processing import ImageProcessing

Content = str | list[dict[str, str]]


def content_with(images: Sequence[str], text: str) -> Content:
    """What a message holds: a text, or the paths of images as parts before one."""
    if not images:
        return text
    return [*({"type": "image", "image": path} for path in images), {"type": "text", "text": text}]


def check_image(path: str) -> tuple[str, str]:
    """The absolute path of an image, and its size in words. Raises DataError for what is none, or is broken."""
    image = read_image(Path(path).expanduser(), PixelLimits())
    return str(Path(path).expanduser().resolve()), f"{image.width:,} × {image.height:,} pixels"


def for_server(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as OpenAI-compatible servers take them: images as PNG in the request."""
    return [
        {**m, "content": [_part(p) for p in m["content"]]} if isinstance(m["content"], list) else m for m in messages
    ]


def _part(part: Mapping[str, str]) -> dict[str, Any]:
    if part["type"] != "image":
        return dict(part)
    whole = BytesIO()
    read_image(part["image"], PixelLimits()).save(whole, format="PNG")
    data = base64.b64encode(whole.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def prompt_inputs(processing: ImageProcessing, text: str, images: Sequence[str]) -> dict[str, Tensor]:
    """Arguments of `generate` for a prompt with a place for each image: `input_ids [1,P]`, pixels, token types."""
    expanded, _ = processing.expand(text, images)
    ids = processing.processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]
    inputs = processing.with_images(Example(ids, ()), images).inputs
    per_token = {name for name, join in processing.family.joins.items() if isinstance(join, PerToken)}
    rows = {name: value[None] if name in per_token else value for name, value in inputs.items()}
    return {"input_ids": torch.tensor([ids]), **rows}
