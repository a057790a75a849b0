"""Prompts with images, as trainers give them to engines."""

from __future__ import annotations

from dataclasses import replace

from tests.vision.test_vision_layouts import example_of
from trl.rollouts.engine import Prompt, Unexpanded
from trl.types import Example
from trl.vision.places import collapsed_ids
from trl.vision.processing import ImageProcessing


def asked(tiny, text, images) -> tuple[Example, Prompt]:
    """An example, and its prompt as a trainer gives it to an engine."""
    example = example_of(tiny, text, images, ())
    processing = ImageProcessing.of(tiny.processor, tiny.model.config)
    own = Unexpanded(collapsed_ids(processing, example.prompt, images), images) if images else None
    return example, replace(Prompt.of(example), unexpanded=own)
