"""Reward functions of pictures: how well they compress, how bright they are, of what colour.

Pictures are a tensor `[b,3,H,W]` in [0, 1]. Rewards are `[b]`; those of brightness and colour can be differentiated, and
those of compression need no model, nor a GPU. What has options is made by a `get_…`.
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
"""Of JPEG, as in DDPO's experiments."""

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
"""Names of colours, red, green and blue in [0, 1]."""


def to_pil(images: Tensor) -> list[Any]:
    """Pictures `[b,3,H,W]` in [0, 1] as those of Pillow."""
    bytes_ = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in bytes_]


def jpeg_incompressibility_reward(images: Tensor) -> list[float]:
    """The size of a picture as JPEG, in units of 1000 bytes. DDPO, arXiv:2305.13301."""
    sizes = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return sizes


def jpeg_compressibility_reward(images: Tensor) -> list[float]:
    """Minus the size of a picture as JPEG, in units of 1000 bytes. DDPO, arXiv:2305.13301."""
    return [-size for size in jpeg_incompressibility_reward(images)]


def brightness_reward(images: Tensor) -> Tensor:
    """The mean of a picture's pixels, 0 (black) to 1 (white)."""
    return images.flatten(1).mean(1)


@dataclass(frozen=True)
class get_color_reward:
    """How near a picture is to one colour: 1 − the mean distance of its channels to it, 0 to 1.

    `color` is a name in `COLORS`, or red, green and blue in [0, 1].
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
    """What share of a picture's colour is of one hue, 0 to 1; 0 for a grey picture.

    Σ relu(min of the hue's channels − max of the others) / (Σ (max − min) + H·W/100), over pixels. `color` is the name of a
    hue in `COLORS`, so neither black nor white.
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
