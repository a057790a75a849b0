"""The two uses of a processor of `transformers`: expand image placeholders in texts, and compute the model's image inputs.

text with a placeholder per image ──expand──▶ text with a placeholder per image token     while encoding; decodes no pixels
ids, images ──with_images──▶ pixel values, token types, positions                         in the data loader
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin

from trl.counts import counted
from trl.errors import ConfigError, DataError
from trl.types import Completion, Example, PerToken
from trl.vision.families import Family, family_of
from trl.vision.images import PixelLimits, image_size, read_image

Span = tuple[int, int]


@dataclass
class ImageProcessing:
    """A processor, the family of its model, and limits on the size of images."""

    processor: ProcessorMixin
    family: Family
    limits: PixelLimits = field(default_factory=PixelLimits)
    _expansions: dict[tuple[int, int, bool], str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, processor: Any, config: PreTrainedConfig, limits: PixelLimits | None = None) -> ImageProcessing | None:
        """Make one for a processor of images; None for a tokenizer. Raises ConfigError for an unsupported model."""
        if not isinstance(processor, ProcessorMixin) or "image_processor" not in processor.get_attributes():
            return None
        family = family_of(config)
        if family is None:
            raise ConfigError(
                f"Images are not supported for models of type {config.model_type!r}: add an entry to "
                "trl.vision.families.FAMILIES that says how to batch their inputs, or give only the tokenizer, "
                "processing_class=processor.tokenizer, to train on texts."
            )
        if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
            raise ConfigError(
                f"{type(processor).__name__} of transformers {transformers.__version__} does not tell the tokens of an image: "
                "install 5.15 or later, or give only the tokenizer, processing_class=processor.tokenizer, to train on texts."
            )
        return cls(processor, family, limits or PixelLimits())

    def settings(self) -> dict[str, Any]:
        """All settings that the expansion of placeholders depends on, as plain values (for a cache key)."""
        images = self.processor.image_processor
        return {
            "processor": type(self.processor).__name__,
            "images": images.to_dict(),
            "chat_template": self.processor.chat_template,
            "limits": self.limits,
        }

    def trial(self) -> list[Example]:
        """Two examples to check a layout with: an image with two answers, and a text."""
        image = Image.linear_gradient("L").convert("RGB").resize(self.trial_size())
        text, _ = self.expand(self.family.prompt.format(images=self.place, text="a b", bos=""), [image])
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        first, second, third = self._words(3)
        answers = (Completion([first, second]), Completion([third, first, third, second]))
        text = Completion([second, third, first, first, third])
        return [self.with_images(Example(ids, answers), [image]), Example([], (text,))]

    def trial_size(self) -> tuple[int, int]:
        """Width and height of the test image; that of the crop if the processor does not resize images."""
        images = self.processor.image_processor.to_dict()
        crop = images.get("crop_size") or images.get("size") or {}
        keeps = images.get("do_resize") is False and {"height", "width"} <= set(crop)
        return (crop["width"], crop["height"]) if keeps else (48, 32)

    def _words(self, count: int) -> list[int]:
        """The `count` smallest ids of ordinary tokens, which are neither special nor image placeholders."""
        special = {*self.processor.tokenizer.all_special_ids, *self.processor.image_token_ids}
        return list(islice((token for token in itertools.count() if token not in special), count))

    # ---- image placeholders in texts ----

    @property
    def place(self) -> str:
        """The placeholder of an image in a text."""
        return self.processor.image_token

    def expand(self, text: str, images: Sequence[Any]) -> tuple[str, list[tuple[Span, int]]]:
        """Replace the placeholder of each image by those of all its tokens; also return each placeholder's span and new length.

        Raises DataError if the numbers of placeholders and images differ.
        """
        found = list(re.finditer(re.escape(self.place), text))
        if len(found) != len(images):
            raise DataError(
                f"{counted(len(images), 'image')} but {counted(len(found), 'placeholder')} ({self.place!r}) in the text. Give one "
                'part {"type": "image"} for each image, or none: images are then put before the text of the first user turn.'
            )
        if self.token != self.place and self.token in text:
            raise DataError(f"the text contains {self.token!r}, which is reserved for the tokens of expanded images.")
        parts, moved, last = [], [], 0
        for match, replacement in zip(found, self.expansions(images), strict=True):
            parts += [text[last : match.start()], replacement]
            moved.append((match.span(), len(replacement)))
            last = match.end()
        return "".join([*parts, text[last:]]), moved

    def expansions(self, images: Sequence[Any]) -> list[str]:
        """The texts that replace the placeholders of the images of one prompt."""
        return [self.expansion(image_size(image, self.limits), several=len(images) > 1) for image in images]

    def expansion(self, size: tuple[int, int], *, several: bool = False) -> str:
        """The text that replaces the placeholder of an image of (height, width), alone in its prompt or one of `several`."""
        key = (*size, several)
        if key not in self._expansions:
            self._expansions[key] = self._counted(size, several) or self._rendered(size, several)
        return self._expansions[key]

    def _rendered(self, size: tuple[int, int], several: bool) -> str:
        """The expansion of a black image of that size, by running the processor on it."""
        blank = Image.new("RGB", (size[1], size[0]))
        return self.processed([blank] * (2 if several else 1))[1][0]

    def _counted(self, size: tuple[int, int], several: bool) -> str | None:
        """The expansion computed from the number of tokens only; None if expansions may differ in more."""
        if self._affixes is None or several:
            return None
        before, after = self._affixes
        return before + self.token * self._count(size) + after

    @cached_property
    def _affixes(self) -> tuple[str, str] | None:
        """The text before and after the tokens of every image; None if images have rows of tokens, or no count is available."""
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):
            return None
        shapes = [(64, 96), (480, 640), (900, 300)]
        found = []
        for shape in shapes:
            run = re.fullmatch(f"(.*?)((?:{re.escape(self.token)})+)(.*)", self._rendered(shape, False), re.DOTALL)
            if run is None or len(run[2]) != len(self.token) * self._count(shape):
                return None
            found.append((run[1], run[3]))
        return found[0] if len(set(found)) == 1 else None

    def _count(self, size: tuple[int, int]) -> int:
        with self._refusals(size):
            return self.processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"][0]

    @contextmanager
    def _refusals(self, *sizes: tuple[int, int]) -> Iterator[None]:
        """Turn the processor's errors into a DataError with the sizes of the images."""
        try:
            yield
        except (ValueError, ZeroDivisionError) as error:
            shown = ", ".join(f"{width:,} × {height:,}" for height, width in sizes)
            raise DataError(
                f"{type(self.processor).__name__} cannot process an image of {shown} pixels: {error}."
            ) from error

    # ---- tokens of images ----

    @property
    def token(self) -> str:
        """The token whose embeddings the model replaces by an image's features."""
        return self.processor.tokenizer.convert_ids_to_tokens(self.token_id)

    @property
    def token_id(self) -> int:
        """Its id."""
        return self.processor.image_token_ids[0]

    def image_end(self, ids: Sequence[int]) -> int:
        """Number of tokens up to the end of the last image: truncating to fewer would cut an image."""
        places = np.flatnonzero(np.asarray(ids) == self.token_id)
        return int(places[-1]) + 1 if len(places) else 0

    # ---- inputs of the model ----

    def read(self, images: Sequence[Any]) -> list[Image.Image]:
        """Decode the images of a row, in RGB and resized to the limits."""
        return [read_image(image, self.limits) for image in images]

    def processed(self, images: Sequence[Image.Image]) -> tuple[Mapping[str, Any], list[str]]:
        """The processor's outputs for the images of one prompt, and the texts that replace their placeholders."""
        options = self.processor._merge_kwargs(
            self.processor.valid_processor_kwargs,
            tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs,
            return_tensors="pt",
        )["images_kwargs"]
        fetched, *_ = self.processor.prepare_inputs_layout(images=list(images), text=None)
        with self._refusals(*((image.height, image.width) for image in images)):
            return self.processor._process_images(fetched, **options)

    def with_images(self, example: Example, images: Sequence[Any]) -> Example:
        """Add the inputs for its images, and positions, to the example.

        Raises DataError if the number of image tokens differs from the number of image features.
        """
        ids = [*example.prompt, *(example.completions[0].ids if len(example.completions) == 1 else ())]
        found = ids.count(self.token_id)
        if not images:
            if found:
                raise DataError(f"There are {found} image tokens ({self.token!r}), but no image.")
            return example
        values, replacements = self.processed(self.read(images))
        wanted = sum(text.count(self.token) for text in replacements)
        if found != wanted:
            raise DataError(
                f"There are {found} image tokens, but its {len(images)} images have {wanted} features: the row was encoded with "
                "other images, or with other pixel limits."
            )
        return self.placed(example, values)

    def placed(self, example: Example, values: Mapping[str, Any]) -> Example:
        """Add the model's inputs from `values`, the per-token inputs and positions to the example; unchanged without images."""
        ids = [*example.prompt, *(example.completions[0].ids if len(example.completions) == 1 else ())]
        if self.token_id not in ids:
            return example
        inputs = {name: _tensor(value) for name, value in values.items() if name in self.family.joins}
        types = np.asarray(ids) == self.token_id
        if self.family.token_types is not None:
            inputs[self.family.token_types] = torch.from_numpy(types.astype(np.int64))
        elif self.family.sees_ahead == "prompt":
            (name,) = (name for name, join in self.family.joins.items() if isinstance(join, PerToken))
            inputs[name] = torch.zeros(len(example.prompt), dtype=torch.long)
        positions, after = None, None
        if self.family.positions == "mrope":
            merge = self.processor.image_processor.merge_size
            positions, after = mrope_positions(types, inputs["image_grid_thw"].numpy(), merge)
        return Example(example.prompt, example.completions, inputs, positions, after)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def mrope_positions(is_image: np.ndarray, grids: np.ndarray, merge: int) -> tuple[np.ndarray, int]:
    """Positions `[3,L]` (time, height, width) of L tokens, and the position of the next one.

        text      t = h = w = one more than the largest so far
        image     t = s,  h = s + row,  w = s + column,   s one more than the largest so far

    is_image   [L] bool, which tokens are image tokens
    grids      [E,3] time, rows and columns of each image's patches; `merge`² patches make a token
    """
    positions = np.zeros((3, len(is_image)), dtype=np.int64)
    at = following = 0
    images = iter(grids)
    while at < len(is_image):
        if not is_image[at]:
            positions[:, at] = following
            at, following = at + 1, following + 1
            continue
        time, rows, columns = next(images) // (1, merge, merge)
        grid = np.stack(np.meshgrid(np.arange(time), np.arange(rows), np.arange(columns), indexing="ij"))
        end = at + int(time * rows * columns)
        positions[:, at:end] = grid.reshape(3, -1) + following
        at, following = end, following + int(max(time, rows, columns))
    return positions, following
