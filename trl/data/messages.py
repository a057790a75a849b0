"""Convert messages of various conventions to the form that chat templates read.

    {"from": "human", "value": "Is it far?"}              {"role": "user", "content": "Is it far?"}
    {"from": "function_call", "value": "{\"name\": …}"}   {"role": "assistant", "tool_calls": [{"function": …}]}
    {"role": "Assistant", …}, {"role": "gpt", …}           {"role": "assistant", …}, unless the template knows such a role
    tool calls of other conventions                        see `trl.data.tool_calls`
    {"role": "assistant", "function_call": {…}}            a tool call; role "function" is "tool" (OpenAI's older files)
    parts of type text, under "text", "value" or "content" joined to one text

A key that says whether a message is trained on (`weight`, `loss_weight`, `train`) has an effect if only the assistant's
turns are trained on: see `is_trained`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from trl.data.tool_calls import tool_calls_of
from trl.errors import DataError

Message = Mapping[str, Any]

ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "ai", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "function"), "tool"),
}
"""Names of speakers in files of other tools → the role that templates know. Other names are unchanged."""

KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer", "ipython")
"""Roles that templates know."""

CALLS = ("function_call", "tool_call")
"""Names of speakers whose value is a tool call as JSON text."""

LOSS_KEYS = ("weight", "loss_weight", "train")
"""Keys of a message that say whether it is trained on: those of OpenAI, LLaMA-Factory and axolotl."""

TEXT_KEYS = ("text", "value", "content")
"""Keys under which a part of type text may have its text."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which templates read the assistant's reasoning."""

INSTEAD_OF_CONTENT = (
    "text",
    "value",
    "message",
    "msg",
    "contents",
    "body",
    "utterance",
    "response",
    "answer",
    "output",
)
"""Keys under which other tools store the content of a message."""

ABOUT_MESSAGE = ("role", "name", "id", "tool_call_id", *LOSS_KEYS)
"""Keys with metadata of a message, which are not content."""


def without_none(value: Any) -> Any:
    """The value without keys whose value is None: Arrow gives every struct of a column the keys of all its structs."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


def to_chatml(message: Any, source: str = "") -> Any:
    """Convert a message with `from` and `value` to `role` and `content`; other keys and other messages are unchanged.

    `source` is the source of the chat template; role names that it uses are kept.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("from"), str):
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, value = message["from"], message.get("value")
    if speaker in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": tool_calls_of(value, "a function_call"), **rest}
    return {"role": role_of(speaker, source), "content": value, **rest}


def role_of(name: str, source: str = "") -> str:
    """The standard role for a name of a speaker; the name itself if the template with this `source` uses it."""
    bare = name.strip().lower()
    role = bare if bare in KNOWN_ROLES else ROLES.get(bare, name)
    return name if role == name or asks_for_role(source, name) else role


@lru_cache(maxsize=1024)
def asks_for_role(source: str, name: str) -> bool:
    """True if a template compares roles with this name."""
    return re.search(rf"role['\"\])\s]*(?:==|!=|\bin\b)[^{{}}%]*['\"]{re.escape(name)}['\"]", source) is not None


@lru_cache(maxsize=1024)
def reads_key(source: str, key: str) -> bool:
    """True if a template reads this key of messages."""
    return re.search(rf"[.'\"]{re.escape(key)}\b", source) is not None


def tidy_messages(messages: Sequence[Message], source: str = "", *, joins_texts: bool = True) -> list[Any]:
    """Convert messages to the form that the template with this `source` reads: see the top of the file.

    Values that are not messages are unchanged, for later checks to report. With `joins_texts`, contents that are lists of text
    parts become one text.

    Raises DataError with the number of the message for content that is not text.
    """
    changed = []
    for i, message in enumerate(messages):
        try:
            message = spoken(message, source)
            changed.append(_with_text(message) if joins_texts else message)
        except DataError as error:
            raise DataError(f"message {i + 1}: {error}") from error
    return changed


def spoken(message: Any, source: str) -> Any:
    """A message with its role and tool calls in the form that the template reads."""
    message = without_none(to_chatml(message, source))
    if not isinstance(message, dict):
        return message
    for key in ("function_call", "tool_call"):
        if (call := message.get(key)) and not reads_key(source, key):
            rest = {name: value for name, value in message.items() if name != key}
            message = {"content": "", **rest, "tool_calls": tool_calls_of(call, key)}
    if isinstance(role := message.get("role"), str):
        message = {**message, "role": role_of(role, source)}
    if calls := message.get("tool_calls"):
        message = {**message, "tool_calls": tool_calls_of(calls, "tool_calls")}
    return message


def _with_text(message: Any) -> Any:
    """The message with text parts joined to one text; a message with other parts is unchanged."""
    if not isinstance(message, dict) or isinstance(message.get("content", ""), str):
        return message
    parts = message["content"]
    if not isinstance(parts, list):
        raise DataError(f"content has to be text, found {parts!r}.")
    if any(not isinstance(part, Mapping) or part.get("type", "text") != "text" for part in parts):
        return message
    texts = [text_of_part(part, number) for number, part in enumerate(parts, 1)]
    return {**message, "content": "".join(texts)}


def text_of_part(part: Mapping[str, Any], number: int) -> str:
    """The text of a part of type text. Raises DataError with the number of the part if it has no text."""
    text = next((part[key] for key in TEXT_KEYS if isinstance(part.get(key), str)), None)
    if text is None:
        raise DataError(f"part {number} of type text has no text: {dict(part)!r}. Give it under the key 'text'.")
    return text


def check_contents(messages: Sequence[Message], source: str = "") -> None:
    """Raise DataError for a message without `content`, tool calls and reasoning, of which a template would show nothing.

    Other keys count as content if the template's `source` reads them.
    """
    for i, message in enumerate(messages):
        if message.get("content") or any(message.get(key) for key in ("tool_calls", *REASONING)):
            continue
        elsewhere = any(isinstance(message.get(key), str) and message[key].strip() for key in INSTEAD_OF_CONTENT)
        if message.get("content") is not None and not elsewhere:
            continue
        others = [key for key in message if key not in ("content", *ABOUT_MESSAGE)]
        if any(reads_key(source, key) for key in others):
            continue
        likely = next((key for key in INSTEAD_OF_CONTENT if key in message), None) or (
            others[0] if len(others) == 1 else ""
        )
        remedy = (
            f"Its text seems to be under {likely!r}: rename that key."
            if likely
            else "Give it one, or remove the message."
        )
        raise DataError(
            f"message {i + 1} ({message.get('role')}) has no {'text in ' if 'content' in message else ''}'content'; its keys are "
            f"{list(message)}. {remedy}"
        )


def contents_as_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with each text content as a list of one part, for templates that read only lists of parts."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def is_trained(message: Message) -> bool:
    """True if a message is trained on, by its keys `weight`, `loss_weight` and `train`; the default is True.

    Raises DataError for a weight that is neither 0 nor 1.
    """
    for key in LOSS_KEYS:
        value = message.get(key, 1)
        if value not in (0, 1):
            raise DataError(f"{key}={value!r} of a message: give 1 to train on it, or 0 not to; nothing in between.")
        if not value:
            return False
    return True


def under_roles(content: str | Sequence[Message]) -> str:
    """A conversation as text, each message after its role; a text is returned unchanged."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {said(message)}" for message in content)


def said(message: Message) -> str:
    """The content of a message as text: parts that are not text as their type, `[image]`; tool calls and reasoning as JSON."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [_part_as_text(part) for part in content]
    others = {key: message[key] for key in ("tool_calls", *REASONING) if message.get(key)}
    return "".join(parts) + (json.dumps(others, ensure_ascii=False, default=str) if others else "")


def _part_as_text(part: Any) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    return str(next((part[key] for key in TEXT_KEYS if part.get(key)), f"[{part.get('type')}]"))
