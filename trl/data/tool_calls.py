"""Convert tool calls of various conventions to the form that chat templates read.

{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}      the result
arguments, a call or all calls as JSON text                                                decoded
{"name": "weather", "arguments": {…}}                                                      put under "function"
"parameters" or "args" in place of "arguments"                                             renamed
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl.data.json_text import decoded
from trl.errors import DataError

Call = Mapping[str, Any]

ARGUMENTS = ("arguments", "parameters", "args", "kwargs", "input")
"""Keys under which the arguments of a call may be; templates read the first."""


def tool_calls_of(value: Any, what: str) -> list[dict[str, Any]]:
    """The tool calls in `value`, which is under the key `what` of a message. Raises DataError if it is not a call."""
    found = decoded(value, what)
    return [_call(decoded(call, what), what) for call in (found if isinstance(found, list) else [found])]


def _call(call: Any, what: str) -> dict[str, Any]:
    if isinstance(call, Mapping) and "function" in call:
        function = decoded(call["function"], what)
        around = dict(call)
    else:
        around, function = {"type": "function"}, call
        if isinstance(call, Mapping):
            around |= {key: call[key] for key in ("id", "type") if key in call}
            function = {key: value for key, value in call.items() if key not in around}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f'{what}: a call has to be JSON with "name" and "arguments", found {str(call)[:60]!r}.')
    return {**around, "function": _with_arguments(function, what)}


def _with_arguments(function: Mapping[str, Any], what: str) -> dict[str, Any]:
    key = next((key for key in ARGUMENTS if key in function), None)
    if key is None:
        return dict(function)
    rest = {name: value for name, value in function.items() if name != key}
    given = function[key]
    if isinstance(given, str):
        given = decoded(given, f"{what}: {key}") if given.strip() else {}
    return {**rest, ARGUMENTS[0]: given}


def words_of(call: Call) -> Iterator[str]:
    """The name of the called tool, and the texts and numbers in its arguments."""
    function = call.get("function", call)
    yield str(function.get("name"))
    yield from _leaves(function.get(ARGUMENTS[0]))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def arguments_as_text(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the arguments of tool calls as JSON text, for templates that expect text."""

    def written(call: Call) -> Call:
        function = call["function"]
        if isinstance(function.get("arguments"), str):
            return call
        return {
            **call,
            "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)},
        }

    return [{**m, "tool_calls": [written(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


def tools_of(value: Any) -> list[Any] | None:
    """The tools of a row: a list of schemas, or of OpenAI's older functions. The list or each tool may be JSON text.

    Raises DataError for anything else.
    """
    if value is None or value == "":
        return None
    try:
        tools = decoded(value, "it")
    except DataError as error:
        raise DataError(f"column 'tools': {value[:60]!r} is not JSON ({error.__cause__}).") from error
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"column 'tools': expected a list of tools, found a {type(tools).__name__}.")
    return [decoded(tool, "column 'tools': a tool") if isinstance(tool, str) else tool for tool in tools]


def tool_names(tools: Sequence[Any]) -> list[str]:
    """The names of tools given as schemas."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
    return [f["name"] for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)]
