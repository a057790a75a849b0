"""Decode values stored as JSON text: conversations, tools and arguments of tool calls, as CSV files and tables hold them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from trl.errors import DataError

SHOWN = 60
"""Most characters of a value that an error message quotes."""


def decoded(value: Any, what: str) -> Any:
    """The decoded value of JSON text, also if it was encoded twice; values that are not text are returned unchanged.

    Raises DataError for text that is not JSON; `what` names the value in the message.
    """
    if not isinstance(value, str):
        return value
    try:
        value = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} has to be JSON text, but {value[:SHOWN]!r} is not ({error}).") from error
    while isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    return value


def conversation_in(text: str) -> list[Any] | None:
    """The messages of a conversation written as JSON or as a Python list; None for any other text.

    Raises DataError for a text that begins like a conversation but cannot be parsed.
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
    """The messages of a conversation stored as a dict of lists, as older column types do; None for any other value."""
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
            f"{text[:SHOWN]!r} begins like a conversation, but is neither JSON nor a Python list ({error}): write it with "
            "json.dumps."
        ) from error
