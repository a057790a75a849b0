"""Convert prompts between one placeholder token per image, as inference servers expect, and all tokens of each image.

    a <image> b, [48 × 32]   ──expanded_ids──▶   a <image><image><image><image> b
                             ◀──collapsed_ids──

If tokenizing the decoded text gives the same ids, the text is converted and tokenized again, since tokens around an image may
merge with its own (line breaks, for example). If not, as after sampled turns, the token ids are replaced in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from trl.errors import DataError
from trl.vision.processing import ImageProcessing


def expanded_ids(processing: ImageProcessing, ids: Sequence[int], images: Sequence[Any]) -> list[int]:
    """Replace each placeholder by all tokens of its image. Raises DataError if their numbers differ."""
    (place,) = _tokens(processing, processing.place)
    if (found := list(ids).count(place)) != len(images):
        raise DataError(
            f"{len(images)} images were given, but the tokens have {found} placeholders ({processing.place!r}): give token ids "
            "before expansion, with one placeholder for each image."
        )
    text = _text_of(processing, ids)
    if text is not None:
        return _tokens(processing, processing.expand(text, images)[0])
    expansions = iter(processing.expansions(images))
    return [each for token in ids for each in (_tokens(processing, next(expansions)) if token == place else [token])]


def collapsed_ids(processing: ImageProcessing, ids: Sequence[int], images: Sequence[Any]) -> list[int]:
    """Replace all tokens of each image by one placeholder. Raises DataError if the tokens of an image are not found."""
    expansions, place, text = processing.expansions(images), processing.place, _text_of(processing, ids)
    in_text = None if text is None else _exchanged(text, expansions, place)
    if in_text is not None:
        return _tokens(processing, in_text)
    tokens = [_tokens(processing, expansion) for expansion in expansions]
    found = _exchanged(list(ids), tokens, _tokens(processing, place))
    if found is None:
        raise DataError(
            "The tokens of an image are not in its prompt: the prompt was encoded with another image, or with other pixel limits."
        )
    return found


Whole = TypeVar("Whole", str, list[int])


def _exchanged(whole: Whole, parts: Sequence[Whole], place: Whole) -> Whole | None:
    """Replace the `parts`, which follow each other in `whole`, by `place`; None if one is not found."""
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
    """Decode the ids; None if tokenizing the text does not give the same ids."""
    text = processing.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if _tokens(processing, text) == list(ids) else None


def _tokens(processing: ImageProcessing, text: str) -> list[int]:
    return list(processing.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
