"""Images in a conversation: messages store their paths, and models and servers receive the decoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Content = str | list[dict[str, str]]


def content_with(images: Sequence[str], text: str) -> Content:
    """The content of a message: the text alone, or a list of image parts (paths) followed by a text part."""
    if not images:
        return text
    return [*({"type": "image", "image": path} for path in images), {"type": "text", "text": text}]


def check_image(path: str) -> tuple[str, str]:
    """The absolute path of an image, and its size as text. Raises DataError if the file is not an image or is
    broken."""
    image = _read(path)
    return str(Path(path).expanduser().resolve()), f"{image.width:,} × {image.height:,} pixels"


def for_server(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as OpenAI-compatible servers take them, with images as PNG data URLs."""
    return [
        {**m, "content": [_part(p) for p in m["content"]]} if isinstance(m["content"], list) else m for m in messages
    ]


def _part(part: Mapping[str, str]) -> dict[str, Any]:
    if part["type"] != "image":
        return dict(part)
    from trl.vision.images import data_url

    return {"type": "image_url", "image_url": {"url": data_url(_read(part["image"]))}}


def _read(path: str) -> Image:
    from trl.vision.images import PixelLimits, read_image  # a chat without images needs neither PIL nor torch

    return read_image(Path(path).expanduser(), PixelLimits())
