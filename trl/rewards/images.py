"""Reward functions for images: compressibility, brightness, colour.

Images are a tensor `[b,3,H,W]` in [0, 1], rewards are `[b]`. Those for brightness and colour are differentiable; none needs a
model or a GPU. Functions with options are made by `get_…` classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trl.errors import ConfigError, unknown

QUALITY = 95
"""JPEG quality, as in the experiments of DDPO."""

COLORS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
}
"""Name of a colour → its red, green and blue channels in [0, 1]."""


def to_pil(images: Tensor) -> list[Any]:
    """Images `[b,3,H,W]` in [0, 1] as Pillow images."""
    bytes_ = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in bytes_]


def jpeg_incompressibility_reward(images: Tensor) -> list[float]:
    """The size of an image as JPEG, in units of 1000 bytes. DDPO, arXiv:2305.13301."""
    sizes = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return sizes


def jpeg_compressibility_reward(images: Tensor) -> list[float]:
    """The negative size of an image as JPEG, in units of 1000 bytes. DDPO, arXiv:2305.13301."""
    return [-size for size in jpeg_incompressibility_reward(images)]


def brightness_reward(images: Tensor) -> Tensor:
    """The mean of an image's pixels, 0 (black) to 1 (white)."""
    return images.flatten(1).mean(1)


@dataclass(frozen=True)
class get_color_reward:
    """How close an image is to one colour: 1 minus the mean absolute distance of its channels to it, 0 to 1.

    `color` is a name in `COLORS`, or three numbers in [0, 1] for red, green and blue.
    """

    color: str | Sequence[float] = "red"

    __name__ = "color_reward"

    def __post_init__(self) -> None:
        if isinstance(self.color, str) and self.color not in COLORS:
            raise ConfigError(unknown("color", self.color, COLORS))
        if not isinstance(self.color, str) and (len(self.color) != 3 or not all(0 <= c <= 1 for c in self.color)):
            raise ConfigError(f"color={self.color!r}: give a name ({', '.join(COLORS)}) or three numbers in [0, 1].")

    def __call__(self, images: Tensor) -> Tensor:
        wanted = COLORS[self.color] if isinstance(self.color, str) else self.color
        distance = (images - torch.tensor(wanted).to(images)[:, None, None]).abs()
        return 1 - distance.flatten(1).mean(1)


@dataclass(frozen=True)
class get_hue_reward:
    """The share of an image's colour that has one hue, 0 to 1; 0 for a grey image.

    Σ relu(min of the hue's channels − max of the others) / (Σ (max − min) + H·W/100), over pixels. `color` is a name in
    `COLORS`, except black and white.
    """

    color: str = "red"

    __name__ = "hue_reward"

    def __post_init__(self) -> None:
        hues = [name for name, channels in COLORS.items() if 0 < sum(channels) < 3]
        if self.color not in hues:
            raise ConfigError(unknown("color", self.color, hues))

    def __call__(self, images: Tensor) -> Tensor:
        wanted = torch.tensor(COLORS[self.color], device=images.device).bool()
        hue = (images[:, wanted].amin(1) - images[:, ~wanted].amax(1)).clamp(min=0)
        chroma = images.amax(1) - images.amin(1)
        return hue.flatten(1).sum(1) / (chroma.flatten(1).sum(1) + 0.01 * chroma[0].numel())
