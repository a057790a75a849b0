"""Messages of a conversation as chat templates read them, whichever convention they are written in.

    {"from": "human", "value": "Is it far?"}              {"role": "user", "content": "Is it far?"}
    {"from": "function_call", "value": "{\"name\": …}"}   {"role": "assistant", "tool_calls": [{"function": …}]}
    {"role": "Assistant", …}, {"role": "gpt", …}           {"role": "assistant", …}, unless the template knows such a role
    tool calls of other conventions                        see `trl.data.tool_calls`
    {"role": "assistant", "function_call": {…}}            a tool call; role "function" is "tool" (OpenAI's older files)
    parts of type text, under "text", "value" or "content" one text

A key that says whether a message is learned from (`weight`, `loss_weight`, `train`) is honoured where only the assistant's
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
"""Who speaks, in files of other tools → the role that templates know. Other names stay as they are."""

KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer", "ipython")
"""Roles that templates know."""

CALLS = ("function_call", "tool_call")
"""Who speaks, where the value is a call as JSON text."""

LOSS_KEYS = ("weight", "loss_weight", "train")
"""Keys of a message that say whether it is learned from: OpenAI's, LLaMA-Factory's, axolotl's."""

TEXT_KEYS = ("text", "value", "content")
"""Where a part of type text holds it."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which templates read what the assistant thought."""

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
"""Keys under which other tools keep what a message says."""

ABOUT_MESSAGE = ("role", "name", "id", "tool_call_id", *LOSS_KEYS)
"""Keys of a message that say nothing by themselves."""


def without_none(value: Any) -> Any:
    """The value without keys that hold None: Arrow gives every struct of a column the keys of all."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


def to_chatml(message: Any, source: str = "") -> Any:
    """One message with `from` and `value` as `role` and `content`; other keys stay, and other values are left alone.

    `source` is the text of the template, whose names of roles are kept.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("from"), str):
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, value = message["from"], message.get("value")
    if speaker in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": tool_calls_of(value, "a function_call"), **rest}
    return {"role": role_of(speaker, source), "content": value, **rest}


def role_of(name: str, source: str = "") -> str:
    """The role that a name stands for; the name itself where the template, whose text is `source`, asks for it."""
    bare = name.strip().lower()
    role = bare if bare in KNOWN_ROLES else ROLES.get(bare, name)
    return name if role == name or asks_for_role(source, name) else role


@lru_cache(maxsize=1024)
def asks_for_role(source: str, name: str) -> bool:
    """Whether a template compares roles with this name."""
    return re.search(rf"role['\"\])\s]*(?:==|!=|\bin\b)[^{{}}%]*['\"]{re.escape(name)}['\"]", source) is not None


@lru_cache(maxsize=1024)
def reads_key(source: str, key: str) -> bool:
    """Whether a template reads a key of its messages."""
    return re.search(rf"[.'\"]{re.escape(key)}\b", source) is not None


def tidy_messages(messages: Sequence[Message], source: str = "", *, joins_texts: bool = True) -> list[Any]:
    """Messages as the template with the text `source` reads them: see the top of the file. What is no message is left for
    checks to name; contents stay as they are unless parts of text are joined.

    Raises DataError, naming the message by its number, for content that is no text.
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
    """A message with the role and the calls of tools as the template reads them."""
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
    """The message with parts of type text as one text; one with other parts as it is."""
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
    """What a part of type text says. Raises DataError, naming the part by its number, where it holds no text."""
    text = next((part[key] for key in TEXT_KEYS if isinstance(part.get(key), str)), None)
    if text is None:
        raise DataError(f"part {number} of type text holds none: {dict(part)!r}. Give it as 'text'.")
    return text


def check_contents(messages: Sequence[Message], source: str = "") -> None:
    """Raises DataError for a message that says nothing a template would read: no `content`, and no call or reasoning.

    Other keys count where `source`, that of the template, names them.
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
            f"Its text seems to stand under {likely!r}: rename that key." if likely else "Give it one, or leave it out."
        )
        raise DataError(
            f"message {i + 1} ({message.get('role')}) has no {'text in ' if 'content' in message else ''}'content', its keys are "
            f"{list(message)}. {remedy}"
        )


def contents_as_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with contents that are text as lists of one part, for templates that read parts alone."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def is_trained(message: Message) -> bool:
    """Whether a message is learned from, as its keys `weight`, `loss_weight` and `train` say; by default it is.

    Raises DataError for a weight that is neither 0 nor 1.
    """
    for key in LOSS_KEYS:
        value = message.get(key, 1)
        if value not in (0, 1):
            raise DataError(f"{key}={value!r} of a message: it is learned from (1) or not (0), and nothing between.")
        if not value:
            return False
    return True


def under_roles(content: str | Sequence[Message]) -> str:
    """A text as it is, or a conversation as text: each message under its role."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {said(message)}" for message in content)


def said(message: Message) -> str:
    """What a message says, as text: a part that is none by its type, `[image]`; calls of tools and reasoning as JSON."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [_part_as_text(part) for part in content]
    others = {key: message[key] for key in ("tool_calls", *REASONING) if message.get(key)}
    return "".join(parts) + (json.dumps(others, ensure_ascii=False, default=str) if others else "")


def _part_as_text(part: Any) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    return str(next((part[key] for key in TEXT_KEYS if part.get(key)), f"[{part.get('type')}]"))
