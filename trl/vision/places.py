"""Token ids with one place for each image, and with all tokens of each: what samplers of their own are sent, and what they read.

    a <image> b, [48 × 32]   ──expanded_ids──▶   a <image><image><image><image> b
                             ◀──collapsed_ids──

Where ids are those that the tokenizer makes of their text, both go by the text, since a template's tokens may merge with those
around an image (line breaks, say). Where they are not, as after sampled turns, tokens are exchanged in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from trl.errors import DataError
from trl.vision.processing import ImageProcessing


def expanded_ids(processing: ImageProcessing, ids: Sequence[int], images: Sequence[Any]) -> list[int]:
    """The ids with all tokens of every image. Raises DataError where there are not as many places as images."""
    (place,) = _tokens(processing, processing.place)
    if (found := list(ids).count(place)) != len(images):
        raise DataError(
            f"{len(images)} images came, and {found} places for them ({processing.place!r}) among the tokens: token ids are "
            "to be those from before expansion, with one place for each image."
        )
    text = _text_of(processing, ids)
    if text is not None:
        return _tokens(processing, processing.expand(text, images)[0])
    expansions = iter(processing.expansions(images))
    return [each for token in ids for each in (_tokens(processing, next(expansions)) if token == place else [token])]


def collapsed_ids(processing: ImageProcessing, ids: Sequence[int], images: Sequence[Any]) -> list[int]:
    """The ids with one place for each image. Raises DataError where the tokens of an image are not among them."""
    expansions, place, text = processing.expansions(images), processing.place, _text_of(processing, ids)
    in_text = None if text is None else _exchanged(text, expansions, place)
    if in_text is not None:
        return _tokens(processing, in_text)
    tokens = [_tokens(processing, expansion) for expansion in expansions]
    found = _exchanged(list(ids), tokens, _tokens(processing, place))
    if found is None:
        raise DataError(
            "The tokens of an image are not in its prompt: the image, or the limits on its pixels, are not those that the prompt "
            "was encoded with."
        )
    return found


Whole = TypeVar("Whole", str, list[int])


def _exchanged(whole: Whole, parts: Sequence[Whole], place: Whole) -> Whole | None:
    """What has `place` where one part after the other is found; None where one is not."""
    made = whole[:0]
    for part in parts:
        starts = range(len(whole) - len(part) + 1)
        start = next((i for i in starts if whole[i : i + len(part)] == part), None)
        if start is None:
            return None
        made += whole[:start] + place
        whole = whole[start + len(part) :]
    return made + whole


def _text_of(processing: ImageProcessing, ids: Sequence[int]) -> str | None:
    """The text that the tokenizer makes exactly these ids of; None where it makes others."""
    text = processing.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if _tokens(processing, text) == list(ids) else None


def _tokens(processing: ImageProcessing, text: str) -> list[int]:
    return list(processing.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
