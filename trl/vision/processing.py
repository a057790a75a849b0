"""A processor of `transformers` in its two uses: how many tokens an image takes, and what the model reads of it.

text with a place for each image ──expand──▶ text with a place for each of an image's tokens     no pixel is decoded
ids, images ──example_inputs──▶ pixel values, token types, positions                            in the loader
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
    """A processor, what its model reads beside tokens, and the limits on images."""

    processor: ProcessorMixin
    family: Family
    limits: PixelLimits = field(default_factory=PixelLimits)
    _expansions: dict[tuple[int, int, bool], str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, processor: Any, config: PreTrainedConfig, limits: PixelLimits | None = None) -> ImageProcessing | None:
        """For a processor that reads images; None for a tokenizer. Raises ConfigError for a model that is not known."""
        if not isinstance(processor, ProcessorMixin) or "image_processor" not in processor.get_attributes():
            return None
        family = family_of(config)
        if family is None:
            raise ConfigError(
                f"Nothing is known of how models of type {config.model_type!r} read images: add an entry to "
                "trl.vision.families.FAMILIES that says how their inputs are joined, or give the tokenizer alone, "
                "processing_class=processor.tokenizer, to train on texts."
            )
        if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
            raise ConfigError(
                f"{type(processor).__name__} of transformers {transformers.__version__} does not say which tokens stand for an "
                "image: install 5.15 or later, or give the tokenizer alone, processing_class=processor.tokenizer, to train on texts."
            )
        return cls(processor, family, limits or PixelLimits())

    def settings(self) -> dict[str, Any]:
        """All that the places of images depend on, as plain values."""
        images = self.processor.image_processor
        return {
            "processor": type(self.processor).__name__,
            "images": images.to_dict(),
            "chat_template": self.processor.chat_template,
            "limits": self.limits,
        }

    def trial(self) -> list[Example]:
        """Two examples to try a layout with: an image with two answers, and a text."""
        image = Image.linear_gradient("L").convert("RGB").resize(self.trial_size())
        text, _ = self.expand(self.family.prompt.format(images=self.place, text="a b", bos=""), [image])
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        first, second, third = self._words(3)
        answers = (Completion([first, second]), Completion([third, first, third, second]))
        text = Completion([second, third, first, first, third])
        return [self.with_images(Example(ids, answers), [image]), Example([], (text,))]

    def trial_size(self) -> tuple[int, int]:
        """Width and height of an image to try; that of the crop where the processor leaves sizes as they are."""
        images = self.processor.image_processor.to_dict()
        crop = images.get("crop_size") or images.get("size") or {}
        keeps = images.get("do_resize") is False and {"height", "width"} <= set(crop)
        return (crop["width"], crop["height"]) if keeps else (48, 32)

    def _words(self, count: int) -> list[int]:
        """The smallest ids of tokens that stand for no image."""
        special = {*self.processor.tokenizer.all_special_ids, *self.processor.image_token_ids}
        return list(islice((token for token in itertools.count() if token not in special), count))

    # ---- places of images in texts ----

    @property
    def place(self) -> str:
        """What stands for an image in a text."""
        return self.processor.image_token

    def expand(self, text: str, images: Sequence[Any]) -> tuple[str, list[tuple[Span, int]]]:
        """The text with every place of an image replaced by those of its tokens; and each place with its new length.

        Raises DataError where there are not as many places as images.
        """
        found = list(re.finditer(re.escape(self.place), text))
        if len(found) != len(images):
            raise DataError(
                f"{counted(len(images), 'image')} and {counted(len(found), 'place')} for them ({self.place!r}) in the text. Give one "
                'part {"type": "image"} for each, or none: images then stand before the text of the first user turn.'
            )
        if self.token != self.place and self.token in text:
            raise DataError(f"the text has {self.token!r}, which stands in prompts for what has been made of an image.")
        parts, moved, last = [], [], 0
        for match, replacement in zip(found, self.expansions(images), strict=True):
            parts += [text[last : match.start()], replacement]
            moved.append((match.span(), len(replacement)))
            last = match.end()
        return "".join([*parts, text[last:]]), moved

    def expansions(self, images: Sequence[Any]) -> list[str]:
        """What takes the places of the images of one prompt."""
        return [self.expansion(image_size(image, self.limits), several=len(images) > 1) for image in images]

    def expansion(self, size: tuple[int, int], *, several: bool = False) -> str:
        """What takes the place of an image of (height, width), alone in its prompt or one of `several`."""
        key = (*size, several)
        if key not in self._expansions:
            self._expansions[key] = self._counted(size, several) or self._rendered(size, several)
        return self._expansions[key]

    def _rendered(self, size: tuple[int, int], several: bool) -> str:
        """The expansion of a black image of that size, as the processor makes it."""
        blank = Image.new("RGB", (size[1], size[0]))
        return self.processed([blank] * (2 if several else 1))[1][0]

    def _counted(self, size: tuple[int, int], several: bool) -> str | None:
        """The expansion from the number of its tokens alone, where expansions differ in nothing else."""
        if self._affixes is None or several:
            return None
        before, after = self._affixes
        return before + self.token * self._count(size) + after

    @cached_property
    def _affixes(self) -> tuple[str, str] | None:
        """What stands around the tokens of every image; None where images are laid out in rows, or counts are not known."""
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
        """What the processor refuses, with the sizes of the images."""
        try:
            yield
        except (ValueError, ZeroDivisionError) as error:
            shown = ", ".join(f"{width:,} × {height:,}" for height, width in sizes)
            raise DataError(
                f"{type(self.processor).__name__} does not take an image of {shown} pixels: {error}."
            ) from error

    # ---- tokens of images ----

    @property
    def token(self) -> str:
        """The token that the model puts an image's features in the place of."""
        return self.processor.tokenizer.convert_ids_to_tokens(self.token_id)

    @property
    def token_id(self) -> int:
        """Its id."""
        return self.processor.image_token_ids[0]

    def image_end(self, ids: Sequence[int]) -> int:
        """How many tokens from the beginning have to stay for no image to be cut."""
        places = np.flatnonzero(np.asarray(ids) == self.token_id)
        return int(places[-1]) + 1 if len(places) else 0

    # ---- what the model reads ----

    def read(self, images: Sequence[Any]) -> list[Image.Image]:
        """Images of a row, decoded, in RGB and within the limits."""
        return [read_image(image, self.limits) for image in images]

    def processed(self, images: Sequence[Image.Image]) -> tuple[Mapping[str, Any], list[str]]:
        """Everything that the processor makes of the images of one prompt, and what takes their places."""
        options = self.processor._merge_kwargs(
            self.processor.valid_processor_kwargs,
            tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs,
            return_tensors="pt",
        )["images_kwargs"]
        fetched, *_ = self.processor.prepare_inputs_layout(images=list(images), text=None)
        with self._refusals(*((image.height, image.width) for image in images)):
            return self.processor._process_images(fetched, **options)

    def with_images(self, example: Example, images: Sequence[Any]) -> Example:
        """The example with what the model reads of its images, and the positions of its tokens.

        Raises DataError where the tokens of its images are not as many as the model makes features.
        """
        ids = [*example.prompt, *(example.completions[0].ids if len(example.completions) == 1 else ())]
        found = ids.count(self.token_id)
        if not images:
            if found:
                raise DataError(f"{found} tokens stand for images ({self.token!r}), but there is no image.")
            return example
        values, replacements = self.processed(self.read(images))
        wanted = sum(text.count(self.token) for text in replacements)
        if found != wanted:
            raise DataError(
                f"{found} tokens stand for images, but its {len(images)} images have {wanted} features: the images, or the "
                "limits on their pixels, are not those that the row was encoded with."
            )
        return self.placed(example, values)

    def placed(self, example: Example, values: Mapping[str, Any]) -> Example:
        """The example with what the model reads of `values`, with inputs per token, and positions; without images, as it is."""
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

    is_image   [L] bool, which tokens stand for images
    grids      [E,3] time, rows and columns of each image's patches; `merge`² of them make a token
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
