"""Rows with images: find the images of a row, and insert a placeholder for each into its conversation or text.

    {"prompt": [{"role": "user", "content": "What is this?"}], "images": [i]}
        ─▶ [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],  [i]

Images are in a column `images` (a list) or `image`, or in the content parts of messages. Their placeholders are parts of
type "image", or "<image>" in a text (the format of LLaVA); if there is none, all images are put before the text of the first
user turn. Prompt, chosen and rejected share the images.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset
from PIL import Image

from trl.counts import counted
from trl.data.columns import CHATS, Columns
from trl.data.formats import PICTURES
from trl.data.messages import check_contents, text_of_part, tidy_messages
from trl.data.tokens import Span
from trl.errors import DataError
from trl.vision.images import from_base64
from trl.vision.processing import ImageProcessing

logger = logging.getLogger(__name__)

IMAGES = "images"
"""Column of encoded rows: a list of `{"bytes", "path"}`."""

TAG = "<image>"
"""Placeholder of an image in texts in the format of LLaVA."""

HELD_IN = ("image", "image_url", "url", "path", "base64")
"""Keys of a content part that may hold the image itself."""

PARTS = 'Parts are {"type": "text", "text": …} and {"type": "image"}; audio and video are not supported.'

NOT_READ = {"video", "videos", "audio", "audios"}
"""Columns of media that are not supported."""

FEATURE = datasets.List(datasets.Image(decode=False))
STORED = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or isinstance(getattr(feature, "feature", None), datasets.Image)


def check_image_columns(rows: Dataset | IterableDataset, unread: Collection[str], kept: Collection[str]) -> None:
    """Raise DataError for unused columns with images, and for columns with audio or video.

    Warns about columns with images that are `kept` for rewards or losses, if the model is given no images.
    """
    features = rows.features or {}
    first = next(iter(rows))
    in_parts = "'image" in str([first.get(name) for name in CHATS])  # in Arrow, each part has the keys of all parts
    has_images = in_parts or not PICTURES.isdisjoint(first)

    def is_image(name: str) -> bool:
        return _holds_images(features.get(name)) or (not has_images and _looks_like_image(first.get(name)))

    if lost := sorted(filter(is_image, unread)):
        raise DataError(
            f"The columns {lost} hold images, but are not used: images have to be in 'images' (a list) or 'image', and answers "
            f"have no images of their own. Rename these columns, or remove them: dataset.remove_columns({lost})."
        )
    if lost := sorted(NOT_READ.intersection(unread)):
        raise DataError(f"Audio and video are not supported. To train without them: dataset.remove_columns({lost}).")
    if not has_images and (shown := sorted(filter(is_image, kept))):
        logger.warning(
            f"The columns {shown} hold images, but the model is not given them: it is given 'images' (a list) or 'image'."
        )


def _looks_like_image(value: Any) -> bool:
    """True if a value, or the first of a list, is an image or the name of an image file."""
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, str):
        return value.startswith("data:image") or Path(value).suffix.lower() in Image.registered_extensions()
    return isinstance(value, bytes | Image.Image) or (isinstance(value, Mapping) and value.keys() == {"bytes", "path"})


def decoded(feature: Any) -> Any:
    """The type of a column, where images are decoded."""
    if not _holds_images(feature):
        return feature
    return datasets.Image() if isinstance(feature, datasets.Image) else datasets.List(datasets.Image())


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The rows with images as bytes and paths instead of pixels; `question` is renamed `prompt` if there are answers."""
    for name, feature in (rows.features or {}).items():
        if _holds_images(feature):
            rows = rows.cast_column(
                name, datasets.Image(decode=False) if isinstance(feature, datasets.Image) else FEATURE
            )
    names = rows.column_names or list(next(iter(rows)))
    answered = {"chosen", "rejected"} <= set(names) or "completion" in names
    if "question" in names and "prompt" not in names and answered:
        rows = rows.rename_column("question", "prompt")
    return rows


def place_images(columns: Columns, processing: ImageProcessing, *, has_template: bool) -> Columns:
    """The columns with a placeholder for every image in their conversations or texts, and with the images of each row."""
    as_chat = has_template and not PICTURES.isdisjoint(columns.values)
    found = columns.each(lambda k, row: _placed(row, processing, as_chat=as_chat, source=columns.source))
    values = {
        name: [placed.get(name, value) for (placed, _), value in zip(found, columns[name], strict=True)]
        for name in columns.values
        if name not in PICTURES
    }
    return replace(columns, values=values, images=[own for _, own in found])


def _placed(
    row: Mapping[str, Any], processing: ImageProcessing, *, as_chat: bool, source: str
) -> tuple[dict[str, Any], list[Any]]:
    """The changed values of a row, and its images. `as_chat` turns plain texts into conversations."""
    images = images_of(row)
    row = _as_chat(row, processing.place) if as_chat else row
    placed = {name: row[name] for name in CHATS if name in row}
    beginning = next((name for name in ("prompt", "messages", "conversations", "chosen") if name in row), None)
    for name, value in placed.items():
        has_prompt = name == beginning or (beginning == "chosen" and name == "rejected")
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            messages, held = split_parts(value, source)
            images = _own_images(images, held, name, repeats=name != beginning) if has_prompt else images
            placed[name] = with_places(messages, len(images)) if has_prompt else _without_places(messages, name)
        elif isinstance(value, str) and not has_prompt:
            _refuse_place(value, name, processing)
        elif isinstance(value, str) and images:
            placed[name] = _text_with_places(value, len(images), processing)
    if beginning is None and images:
        text = next((name for name in row if isinstance(row[name], str) and name not in PICTURES), None)
        if text is not None:
            placed[text] = _text_with_places(row[text], len(images), processing)
    return placed, images


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row's column `images` or `image`; empty for [] or None."""
    images, image = row.get("images"), row.get("image")
    if images and image is not None:
        raise DataError("it has images in both columns 'images' and 'image': keep one of them.")
    if images is not None:
        several = list(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
        if None in several:
            raise DataError(
                "column 'images' has None in its list of images: for a row without images, give [] or None."
            )
        return several
    return [] if image is None else [image]


def _own_images(images: list[Any], held: list[Any], name: str, *, repeats: bool) -> list[Any]:
    """The images of a row, from its columns or else from messages (`held`); with `repeats`, `held` has to equal `images`."""
    if repeats:
        if held and held != images:
            raise DataError(f"{name!r} has other images than 'chosen', but both have to share those of the prompt.")
        return images
    if images and held:
        raise DataError("it has images both in its messages and in a column: keep one of them.")
    return images or held


SHARED = "Answers have no images of their own: chosen and rejected share the images of the prompt."


def _without_places(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The messages of an answer. Raises DataError if they have a placeholder for an image."""
    if _places(messages):
        raise DataError(f'{name!r} has an image, as a part of type "image" or as {TAG!r} in a text. {SHARED}')
    return messages


def _refuse_place(text: str, name: str, processing: ImageProcessing) -> None:
    """Raise DataError for an answer with a placeholder or token of an image."""
    for place in (processing.place, processing.token):
        if place in text:
            raise DataError(f"{name!r} has {place!r}, the placeholder of an image. {SHARED}")


def _places(messages: Sequence[Mapping[str, Any]]) -> int:
    parts = (part for m in messages if isinstance(m.get("content"), list) for part in m["content"])
    return sum(part.get("type") == "image" for part in parts)


def _as_chat(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A row of plain texts as a conversation: the prompt becomes a user message, answers become assistant messages.

    A prompt that says where its images are, by "<image>" or by the model's own placeholder, is a whole text already.
    """
    if not isinstance(row.get("prompt"), str) or TAG in row["prompt"] or place in row["prompt"]:
        return dict(row)
    said = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    spoken = {
        name: [{"role": role, "content": row[name]}] for name, role in said.items() if isinstance(row.get(name), str)
    }
    return {**row, **spoken}


def split_parts(messages: Sequence[Mapping[str, Any]], source: str = "") -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with contents as lists of parts, and the images that were inside of parts.

    Raises DataError with the numbers of message and part for a part that is neither text nor an image.
    """
    made, held = [], []
    for number, message in enumerate(map(dict, tidy_messages(messages, source, joins_texts=False)), 1):
        content = message.get("content")
        parts = _tagged(content) if isinstance(content, str) else content
        try:
            if isinstance(parts, list):
                message["content"] = [_plain_part(part, k, held) for k, part in enumerate(parts, 1)]
        except DataError as error:
            raise DataError(f"message {number}: {error}") from error
        made.append(message)
    return made, held


def _tagged(text: str) -> list[dict[str, Any]]:
    """Split a text at "<image>" into text parts and image parts."""
    pieces = text.split(TAG)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    pieces = [piece.strip("\n") for piece in pieces]
    parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        parts += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
    return parts


def _plain_part(part: Any, number: int, held: list[Any]) -> dict[str, Any]:
    """The part as templates read it: its text, or a placeholder for an image; the image itself is appended to `held`."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": text_of_part(part, number)}
    if kind not in ("image", "image_url"):
        raise DataError(f"part {number} is neither text nor an image: {str(part)[:60]}. {PARTS}")
    name = next((key for key in HELD_IN if part.get(key) is not None), None)
    if name is not None:
        image = part[name]
        image = image["url"] if isinstance(image, Mapping) and "url" in image else image
        held.append(from_base64(image) if name == "base64" else image)
    return {"type": "image"}


def with_places(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The messages with an image part for each of `count` images: their own, or new ones before the first user turn's text."""
    there = _places(messages)
    if there == count:
        return messages
    if there:
        raise DataError(
            f'the messages have placeholders for {counted(there, "image")}, but the row has {count}. Give a part {{"type": "image"}} '
            "for each, or none: images are then put before the text of the first user turn."
        )
    asked = next((i for i, message in enumerate(messages) if message.get("role") in ("user", "human")), None)
    if asked is None:
        raise DataError(f"it has {counted(count, 'image')}, but no user turn to put them before.")
    check_contents(messages[asked : asked + 1])
    first = {**messages[asked], "content": [{"type": "image"}] * count + list(messages[asked]["content"])}
    return [*messages[:asked], first, *messages[asked + 1 :]]


def _text_with_places(text: str, count: int, processing: ImageProcessing) -> str:
    place = processing.place
    if TAG in text and place != TAG:
        text = text.replace(TAG, place)
    if place in text:
        return text
    bos = processing.processor.tokenizer.bos_token or ""
    return processing.family.prompt.format(images=place * count, text=text, bos=bos)


def stored(image: Any) -> dict[str, Any]:
    """An image in the format of the column `images` of encoded rows."""
    if isinstance(image, Mapping):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    if isinstance(image, Image.Image):
        whole = BytesIO()
        image.save(whole, format="PNG")
        return {"bytes": whole.getvalue(), "path": None}
    return {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": str(image)}


def expanded(columns: Columns, processing: ImageProcessing | None, texts: Sequence[str]) -> list[str]:
    """The texts of all rows, with each image placeholder replaced by the tokens of its image."""
    return expanded_spans(columns, processing, texts, [()] * len(texts))[0]


def expanded_spans(
    columns: Columns, processing: ImageProcessing | None, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> tuple[list[str], list[list[Span]]]:
    """As `expanded`; also returns the spans of characters, moved to their places in the expanded texts."""
    if columns.images is None:
        return list(texts), [list(each) for each in spans]
    found = columns.each(lambda k, row: processing.expand(texts[k], columns.images[k]))
    moved = [[_moved(span, places) for span in each] for each, (_, places) in zip(spans, found, strict=True)]
    return [text for text, _ in found], moved


def _moved(span: Span, places: Sequence[tuple[Span, int]]) -> Span:
    """The span of the same characters after each of `places` (a span and its new length) has been replaced."""

    def at(character: int) -> int:
        return character + sum(length - (end - start) for (start, end), length in places if end <= character)

    return at(span[0]), at(span[1])
