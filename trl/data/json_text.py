"""Values that came as text: conversations, tools and arguments of calls, which CSV files and uniform tables hold as JSON."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from trl.errors import DataError

SHOWN = 60
"""Characters of a value in an error."""


def decoded(value: Any, what: str) -> Any:
    """The value that JSON text stands for, also where it was encoded twice; what is no text is left alone.

    Raises DataError, naming `what` it is, for text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        value = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is JSON text, and {value[:SHOWN]!r} is none ({error}).") from error
    while isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    return value


def conversation_in(text: str) -> list[Any] | None:
    """The messages that a text is, as JSON or as Python writes lists; None for a text that is none.

    Raises DataError for one that begins like a conversation and cannot be read.
    """
    begins = "".join(text[:SHOWN].split()).replace("'", '"')
    if not begins.startswith(('[{"role":', '[{"from":', '[{"content":', '[{"value":')):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _python(text)
    is_chat = isinstance(found, list) and all(isinstance(m, Mapping) and {"role", "from"} & m.keys() for m in found)
    return found if is_chat else None


def messages_of(value: Any) -> list[dict[str, Any]] | None:
    """The messages of a conversation that came as a dict of lists, as older types of columns hold it; None of another value."""
    if not isinstance(value, Mapping) or not {"role", "from"} & value.keys():
        return None
    if not all(isinstance(each, list) for each in value.values()) or len({*map(len, value.values())}) != 1:
        return None
    return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]


def _python(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(
            f"{text[:SHOWN]!r} begins like a conversation, and is neither JSON nor a Python list ({error}): write it with "
            "json.dumps."
        ) from error
