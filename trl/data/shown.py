"""Check that a rendered conversation shows everything in its row: contents, tool calls, reasoning and tools.

A key that is a likely typing error, or that excludes messages from training in an unsupported way, is an error. Other keys and
roles that neither the template nor training uses are warned about once.

To find what a template drops, a conversation is rendered with and without it. Many templates drop the reasoning of earlier
turns, which is allowed; the last reasoning has to be shown when the conversation is cut after its message.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.data.messages import ABOUT_MESSAGE, KNOWN_ROLES, REASONING, asks_for_role, reads_key
from trl.data.tool_calls import tool_names, words_of
from trl.errors import DataError, suggest

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Messages = Sequence[Message]

LONG = 12
"""Number of characters from which on a content is not expected to occur by chance in a header or another message."""
CHANGE = " ≠"
"""Text appended to a content, to see whether the rendering changes."""
THOUGHT_ENDS = "</think>"
"""End of the reasoning within a content."""

READ = ("content", "tool_calls", "function_call", *REASONING, *ABOUT_MESSAGE)
"""Keys that templates or training use."""

ABOUT_LOSS = re.compile(r"train(ing|able|ed|_detail)|learn|loss(_mask)?|mask(ed)?|labels")
"""Keys by which other tools say which messages are trained on, in ways that are not supported."""

ALIKE = 0.8
"""Similarity from which on a name is taken for a typing error of another."""
SHORTEST = 4
"""Least number of letters of names that are compared: shorter ones are similar by chance."""


@dataclass
class ShownCheck:
    """The check for one template, with its `name` for messages and its `source`."""

    name: str
    source: str
    known_places: set[tuple[Any, int]] = field(default_factory=set)
    """(role, index of the text part) pairs whose text the template is known to show."""
    shows_tools: bool = False
    """Whether the template is known to show tools."""
    said: set[str] = field(default_factory=set)
    """Unused keys and roles that have been warned about."""

    def check(self, messages: Messages, text: str, render: Callable[[Messages], str]) -> None:
        """Raise DataError if `text`, the rendering of `messages`, does not show a content or tool call of a message.

        `render` renders changed messages in the same way.
        """
        for i, message in enumerate(messages):
            if (said := self._lost_text(messages, i, text, render)) is not None:
                raise self._error(i, message, "content", said)
            if (lost := self._lost_call(messages, i, text, render)) is not None:
                raise self._error(i, message, "tool_calls", lost)

    def check_tools(self, tools: Sequence[Any], text: str, render: Callable[[], str]) -> None:
        """Raise DataError if `text` does not show the tools: `render()` is the same conversation without them."""
        if self.shows_tools:
            return
        if render() == text:
            names = ", ".join(tool_names(tools)) or str(tools)
            raise DataError(
                f"column 'tools': the chat template of {self.name!r} does not show tools, here {names[:60]}. Use a template "
                "that does, or remove the column."
            )
        self.shows_tools = True

    def _error(self, i: int, message: Message, lost: str, value: Any, remedy: str = "") -> DataError:
        return DataError(
            f"message {i + 1} ({message.get('role')}): the chat template of {self.name!r} does not show its {lost}, "
            f"{str(value)[:60]!r}. {remedy or 'Use a template that does, write the message in another way, or remove it.'}"
        )

    def _lost_text(self, messages: Messages, i: int, text: str, render: Callable[[Messages], str]) -> str | None:
        """The first text of message i that does not influence the rendering; None if all do."""
        role = messages[i].get("role")
        for place, (said, changed) in enumerate(_texts(messages[i].get("content"))):
            if self._is_seen(said.strip(), (role, place), messages, text):
                continue
            if render([*messages[:i], {**messages[i], "content": changed}, *messages[i + 1 :]]) == text:
                return said
            self.known_places.add((role, place))
        return None

    def _is_seen(self, said: str, place: tuple[Any, int], messages: Messages, text: str) -> bool:
        """True if the rendering has the text at least as often as the messages do, and not by chance.

        That is, the text is long, or the template is known to show texts of this role and part (`place`).
        """
        if not said:
            return True
        repeats = sum(said in other for message in messages for other, _ in _texts(message.get("content")))
        return text.count(said) >= repeats and (len(said) >= LONG or place in self.known_places)

    def _lost_call(self, messages: Messages, i: int, text: str, render: Callable[[Messages], str]) -> Any:
        """The first tool call of message i that can be removed, or lose its arguments, without changing the rendering; else
        None."""
        message = messages[i]
        calls = message.get("tool_calls") or []
        if len(calls) == 1 and all(word in text for word in words_of(calls[0])):
            return None
        for k, call in enumerate(calls):
            rest = [*calls[:k], *calls[k + 1 :]]
            others = {name: value for name, value in message.items() if name != "tool_calls"}
            fewer = {**others, "tool_calls": rest} if rest else others
            bare = {**message, "tool_calls": [*calls[:k], _without_arguments(call), *calls[k + 1 :]]}
            for changed in (fewer, bare):
                if changed != message and self._same(text, [*messages[:i], changed, *messages[i + 1 :]], render):
                    return call["function"]
        return None

    def _same(self, text: str, changed: Messages, render: Callable[[Messages], str]) -> bool:
        try:
            return render(changed) == text
        except DataError:  # a template may refuse the changed messages
            return False

    def check_reasoning(self, messages: Messages, render: Callable[[Messages], str]) -> None:
        """Raise DataError if the last reasoning is not shown even when the conversation is cut after its message.

        `render` renders messages without a generation prompt.
        """
        i = max((i for i, message in enumerate(messages) if _reasoning(message)), default=None)
        if i is None:
            return
        key, thought = _reasoning(messages[i])
        if key == "content":
            changed = {**messages[i], key: messages[i][key].replace(thought, f"{thought}{CHANGE}", 1)}
        else:
            changed = {name: value for name, value in messages[i].items() if name not in REASONING}
        if render(messages[: i + 1]) != render([*messages[:i], changed]):
            return
        read = [f"{name!r}" for name in REASONING if name in self.source and name != key]
        remedy = f"It reads {' and '.join(read)}: put the reasoning there." if read else ""
        what = "reasoning" if key == "content" else key
        raise self._error(i, messages[i], what, thought, remedy)

    def check_keys(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise DataError for a key that is a likely typing error, or an unsupported way to exclude messages from training."""
        for i, message in enumerate(messages):
            self._say_role(message.get("role"))
            said = [key for key, value in message.items() if value not in ("", [], {}) and key not in READ]
            unread = [key for key in said if key not in self.said and not reads_key(self.source, key)]
            for key in unread:
                if ABOUT_LOSS.fullmatch(key):
                    raise DataError(
                        f"message {i + 1} ({message.get('role')}): the key {key!r} is not supported. Use 'weight', 0 or 1, to say "
                        "whether the message is trained on, or remove the key."
                    )
                if (meant := meant_key(key)) is not None:
                    raise DataError(
                        f"message {i + 1} ({message.get('role')}): the key {key!r} is not used. Did you mean {meant!r}? Rename "
                        "it, or remove it."
                    )
            self._say_keys(unread)

    def _say_keys(self, unread: Sequence[str]) -> None:
        if unread:
            self.said |= set(unread)
            logger.warning(
                f"Messages have keys that the chat template of {self.name!r} does not read: "
                f"{', '.join(map(repr, unread))}. Their values are not trained on."
            )

    def _say_role(self, role: Any) -> None:
        if role in KNOWN_ROLES or role in self.said or asks_for_role(self.source, str(role)):
            return
        self.said.add(role)
        logger.warning(
            f"Messages have the role {role!r}, which the chat template of {self.name!r} does not know: its name is written "
            "unchanged, and the messages do not count as the assistant's. The roles are system, user, assistant and tool."
            f"{suggest(str(role), ('system', 'user', 'assistant', 'tool'))}"
        )


def meant_key(key: str) -> str | None:
    """The used key of which this one is a likely typing error; None if it is similar to none of them."""
    bare = key.strip().lower().replace("-", "_")
    if bare in READ:
        return bare
    known = [name for name in READ if len(name) >= SHORTEST]
    near = difflib.get_close_matches(bare, known, n=1, cutoff=ALIKE) if len(bare) >= SHORTEST else []
    return near[0] if near else None


def _texts(content: Any) -> list[tuple[str, Any]]:
    """Pairs of each text of a content, and the content with that text changed; a content of parts may have several texts."""
    if isinstance(content, str):
        return [(content, content + CHANGE)]
    parts = content if isinstance(content, list) else []
    texts = [(k, part["text"]) for k, part in enumerate(parts) if part.get("type") == "text"]
    return [(said, [*parts[:k], {**parts[k], "text": said + CHANGE}, *parts[k + 1 :]]) for k, said in texts]


def _without_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The tool call without its arguments."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": {}}} if function.get("arguments") else dict(call)


def _reasoning(message: Message) -> tuple[str, str] | None:
    """Key and text of the assistant's reasoning: under its own key, or before `</think>` in the content; None if none."""
    if message.get("role") != "assistant":
        return None
    key = next((key for key in REASONING if isinstance(message.get(key), str) and message[key].strip()), None)
    if key is not None:
        return key, message[key]
    content = message.get("content")
    if not isinstance(content, str) or THOUGHT_ENDS not in content:
        return None
    thought = content.partition(THOUGHT_ENDS)[0].rpartition("<think>")[2].strip()
    return ("content", thought) if thought else None
