"""Messages of a conversation as chat templates read them, whichever convention they are written in.

    {"from": "human", "value": "Is it far?"}              {"role": "user", "content": "Is it far?"}
    {"from": "function_call", "value": "{\"name\": …}"}   {"role": "assistant", "tool_calls": [{"function": …}]}
    arguments of tool calls as JSON text                   decoded once
    {"role": "assistant", "function_call": {…}}            a tool call; role "function" is "tool" (OpenAI's older files)
    parts of type text, under "text", "value" or "content" one text

A key that says whether a message is learned from (`weight`, `loss_weight`, `train`) is honoured where only the assistant's
turns are trained on: see `is_trained`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trl.errors import DataError

Message = Mapping[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
}
"""Who speaks, in ShareGPT's files → the role that templates know. Other names stay as they are."""

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


def to_chatml(message: Any) -> Any:
    """One message with `from` and `value` as `role` and `content`; other keys stay, and other values are left alone."""
    if not isinstance(message, Mapping) or not isinstance(message.get("from"), str):
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    speaker, value = message["from"], message.get("value")
    if speaker in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(value), **rest}
    return {"role": ROLES.get(speaker, speaker), "content": value, **rest}


def _calls(value: Any) -> list[dict[str, Any]]:
    """The calls that a `function_call` of ShareGPT holds: one, or a list of them, as JSON text."""
    found = _json(value, "a function_call")
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise DataError(f'a function_call is JSON with a "name" and "arguments", found {str(value)[:60]!r}.')
    return [{"type": "function", "function": dict(call)} for call in calls]


def _json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is JSON text, and {value[:60]!r} is none ({error}).") from error


def tidy_messages(messages: Sequence[Message]) -> list[Any]:
    """Messages as templates read them: see the top of the file. What is no message is left for checks to name.

    Raises DataError, naming the message by its number, for content that is no text.
    """
    tidy = []
    for i, message in enumerate(messages):
        try:
            tidy.append(_tidy(without_none(to_chatml(message))))
        except DataError as error:
            raise DataError(f"message {i + 1}: {error}") from error
    return tidy


def _tidy(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    if isinstance(call := message.get("function_call"), Mapping):
        rest = {key: value for key, value in message.items() if key != "function_call"}
        message = {"content": "", **rest, "tool_calls": [{"type": "function", "function": dict(call)}]}
    if message.get("role") == "function":
        message = {**message, "role": "tool"}
    if isinstance(calls := message.get("tool_calls"), list):
        message = {**message, "tool_calls": [_decoded(call) for call in calls]}
    content = message.get("content")
    if isinstance(content, list):
        return _joined(message)
    if "content" in message and not isinstance(content, str):
        raise DataError(f"content has to be text, found {content!r}.")
    return message


def check_contents(messages: Sequence[Message], source: str = "") -> None:
    """Raises DataError for a message that says nothing a template would read: no `content`, and no call or reasoning.

    Other keys count where `source`, that of the template, names them.
    """
    for i, message in enumerate(messages):
        if message.get("content") is not None or any(message.get(key) for key in ("tool_calls", *REASONING)):
            continue
        others = [key for key in message if key not in ("content", *ABOUT_MESSAGE)]
        if any(key in source for key in others if key not in INSTEAD_OF_CONTENT):
            continue
        likely = next((key for key in INSTEAD_OF_CONTENT if key in message), None) or (
            others[0] if len(others) == 1 else ""
        )
        remedy = (
            f"Its text seems to stand under {likely!r}: rename that key." if likely else "Give it one, or leave it out."
        )
        raise DataError(
            f"message {i + 1} ({message.get('role')}) has no 'content', its keys are {list(message)}. {remedy}"
        )


def _decoded(call: Any) -> Any:
    """A tool call whose arguments are a mapping, also where they were given as JSON text."""
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    if not isinstance(function.get("arguments"), str) or not function["arguments"].strip():
        return call
    return {**call, "function": {**function, "arguments": _json(function["arguments"], "tool_calls: arguments")}}


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with parts of type text as one text; one with other parts as it is."""
    parts = message["content"]
    if any(not isinstance(part, Mapping) or part.get("type", "text") != "text" for part in parts):
        return message
    texts = [next((part[key] for key in TEXT_KEYS if isinstance(part.get(key), str)), None) for part in parts]
    if None in texts:
        missing = texts.index(None)
        part = parts[missing]
        raise DataError(f"part {missing + 1} of type text holds none: {dict(part)!r}. Give it as 'text'.")
    return {**message, "content": "".join(texts)}


def arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as JSON text, for templates that write them as they are given."""

    def written(call: Message) -> Message:
        function = call["function"]
        if isinstance(function.get("arguments"), str):
            return call
        return {
            **call,
            "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)},
        }

    return [{**m, "tool_calls": [written(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


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
