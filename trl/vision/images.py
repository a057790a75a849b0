"""Read the images of rows, given as paths, bytes, PIL images or values of a `datasets` column, or only their sizes.

read_image({"bytes": …, "path": None})   an RGB image, resized to at most `max_pixels`
image_size(…)                            its (height, width), from the header of the file without decoding it
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trl.errors import ConfigError, DataError
from trl.option_bounds import check_bounds

ORIENTATION = 0x0112
"""Exif tag of the orientation; from 5 on, width and height are exchanged."""


@dataclass(frozen=True)
class PixelLimits:
    """Limits on width · height of an image; an image beyond them is resized with its aspect ratio kept.

    `root` is the folder to which relative paths refer.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.max_pixels is not None and (self.min_pixels or 0) > self.max_pixels:
            raise ConfigError(f"min_pixels={self.min_pixels} is more than max_pixels={self.max_pixels}.")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of this size is resized to."""
        pixels = height * width
        if self.max_pixels is not None and pixels > self.max_pixels:
            scale = math.sqrt(self.max_pixels / pixels)
            return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        if self.min_pixels is not None and pixels < self.min_pixels:
            scale = math.sqrt(self.min_pixels / pixels)
            return math.ceil(height * scale), math.ceil(width * scale)
        return height, width


def open_image(value: Any, root: str | None = None) -> Image.Image:
    """Open the image of a row without decoding it: a path, data URL, bytes, `{"bytes", "path"}` or a PIL image.

    Raises DataError for anything else, for a file that does not exist, and for one that is not an image.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        value = from_base64(value.partition(",")[2])
    if isinstance(value, bytes):
        return _opened(BytesIO(value), f"{len(value):,} bytes")
    if value == "":
        raise DataError("An image is an empty string: give a path, or None for a row without an image.")
    if isinstance(value, str | Path):
        path = Path(root, value) if root is not None else Path(value)
        if str(value).startswith(("http://", "https://")):
            raise DataError(f"{str(value)!r} is a URL: download images beforehand, and give paths or bytes.")
        if not path.expanduser().is_file():
            raise DataError(f"There is no file {str(path)!r}. Relative paths refer to image_folder.")
        return _opened(path.expanduser(), repr(str(path)))
    raise DataError(f"Expected an image (a path, bytes or a PIL image), found {type(value).__name__}.")


def _opened(source: Any, name: str) -> Image.Image:
    try:
        return Image.open(source)
    except UnidentifiedImageError as error:
        raise DataError(f"{name} does not contain an image in a format that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: {error} Make the image smaller, or increase PIL.Image.MAX_IMAGE_PIXELS if you trust your images."
        ) from error
    except (OSError, SyntaxError) as error:
        raise DataError(f"{name} cannot be opened as an image: {error}.") from error


def from_base64(text: str) -> bytes:
    """Decode base64. Raises DataError if the text is invalid."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise DataError(f"An image in base64 cannot be read ({error}): it begins with {text[:20]!r}.") from error


def data_url(image: Image.Image) -> str:
    """The image as a data URL with a PNG, for requests to servers."""
    whole = BytesIO()
    image.save(whole, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(whole.getvalue()).decode()}"


def image_size(value: Any, limits: PixelLimits) -> tuple[int, int]:
    """(height, width) of the image that `read_image` returns, from the header of its file. Raises DataError as that does."""
    image = open_image(value, limits.root)
    _check_mode(image)
    width, height = image.size
    if Image.Image.getexif(image).get(ORIENTATION, 1) >= 5:  # PngImageFile's own getexif would decode the image
        width, height = height, width
    if image is not value:
        image.close()
    return limits.size(height, width)


def read_image(value: Any, limits: PixelLimits) -> Image.Image:
    """The image in RGB, upright, within the limits. Raises DataError as `open_image` does, and for a broken file."""
    image = open_image(value, limits.root)
    try:
        upright = _as_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError) as error:
        raise DataError(f"The image {_name_of(value)} cannot be decoded: {error}.") from error
    finally:
        if image is not value:
            image.close()
    height, width = limits.size(upright.height, upright.width)
    return upright if (width, height) == upright.size else upright.resize((width, height), Image.Resampling.BICUBIC)


def _name_of(value: Any) -> str:
    """Description of an image for an error: its path, or its size."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("bytes")
    if isinstance(value, bytes):
        return f"of {len(value):,} bytes"
    return f"of {value.width:,} × {value.height:,} pixels" if isinstance(value, Image.Image) else repr(str(value)[:200])


def _check_mode(image: Image.Image) -> None:
    """Raises DataError for floating-point pixels, whose range of values is unknown."""
    if image.mode == "F":
        raise DataError("An image has floating-point pixels: save it with 8 or 16 bits per channel.")


def _as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: transparency on a white background, 16-bit grey to 8 bits."""
    _check_mode(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
