"""Whether a rendered conversation shows all that its row says: contents, calls of tools, reasoning, and the tools there are.

A key that looks like one that is read, or says what is learned in a way that is not read, is an error; any other that neither
the template nor training reads is said once, and so is a role.

What a template drops is found by rendering with and without it. Reasoning may be dropped once a turn is past, as many
templates do; the last that there is has to be shown where the conversation ends with it.
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
from trl.errors import DataError

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Messages = Sequence[Message]

LONG = 12
"""Letters of a content that no header or other message holds by chance."""
CHANGE = " ≠"
"""What is added to a content to see whether the rendering shows it."""
THOUGHT_ENDS = "</think>"
"""What ends reasoning inside a content."""

READ = ("content", "tool_calls", "function_call", *REASONING, *ABOUT_MESSAGE)
"""Keys that templates or training read."""

ABOUT_LOSS = re.compile(r"train(ing|able|ed|_detail)|learn|loss(_mask)?|mask(ed)?|labels")
"""Keys by which other tools say what is learned, each in its own way."""

ALIKE = 0.8
"""Likeness from which on one name is taken for a slip in writing another."""
SHORTEST = 4
"""Letters of names that are compared: shorter ones are alike by chance."""


@dataclass
class ShownCheck:
    """The check of one template, of that `name` and the text `source`."""

    name: str
    source: str
    known_places: set[tuple[Any, int]] = field(default_factory=set)
    """Roles, and places of texts in contents, that the template has been seen to show."""
    shows_tools: bool = False
    """Whether the template has been seen to show tools."""
    said: set[str] = field(default_factory=set)
    """Keys and roles that have been said not to be read."""

    def check(self, messages: Messages, text: str, render: Callable[[Messages], str]) -> None:
        """Raises DataError where something that a message says is not in `text`, their rendering.

        `render` makes such a text of changed messages.
        """
        for i, message in enumerate(messages):
            if (said := self._lost_text(messages, i, text, render)) is not None:
                raise self._error(i, message, "content", said)
            if (lost := self._lost_call(messages, i, text, render)) is not None:
                raise self._error(i, message, "tool_calls", lost)

    def check_tools(self, tools: Sequence[Any], text: str, render: Callable[[], str]) -> None:
        """Raises DataError where `text` is what `render` makes without the tools."""
        if self.shows_tools:
            return
        if render() == text:
            names = ", ".join(tool_names(tools)) or str(tools)
            raise DataError(
                f"column 'tools': the chat template of {self.name!r} does not show tools, here {names[:60]}. Take a template "
                "that does, or leave the column out."
            )
        self.shows_tools = True

    def _error(self, i: int, message: Message, lost: str, value: Any, remedy: str = "") -> DataError:
        return DataError(
            f"message {i + 1} ({message.get('role')}): the chat template of {self.name!r} does not show its {lost}, "
            f"{str(value)[:60]!r}. {remedy or 'Take a template that does, write the message otherwise, or leave it out.'}"
        )

    def _lost_text(self, messages: Messages, i: int, text: str, render: Callable[[Messages], str]) -> str | None:
        """The first text of message i whatever which the rendering is the same; None if there is none."""
        role = messages[i].get("role")
        for place, (said, changed) in enumerate(_texts(messages[i].get("content"))):
            if self._is_seen(said.strip(), (role, place), messages, text):
                continue
            if render([*messages[:i], {**messages[i], "content": changed}, *messages[i + 1 :]]) == text:
                return said
            self.known_places.add((role, place))
        return None

    def _is_seen(self, said: str, place: tuple[Any, int], messages: Messages, text: str) -> bool:
        """Whether the rendering holds a text of that place at least as often as the messages do, and not by chance."""
        if not said:
            return True
        repeats = sum(said in other for message in messages for other, _ in _texts(message.get("content")))
        return text.count(said) >= repeats and (len(said) >= LONG or place in self.known_places)

    def _lost_call(self, messages: Messages, i: int, text: str, render: Callable[[Messages], str]) -> Any:
        """The first call of message i, or its arguments, without which the rendering is the same; None if there is none."""
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
        except DataError:  # a template may refuse what the row does not say
            return False

    def check_reasoning(self, messages: Messages, render: Callable[[Messages], str]) -> None:
        """Raises DataError where the last reasoning is not shown though the conversation ends with it.

        `render` makes a whole text, without a generation prompt, of the first messages.
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
        remedy = f"It reads {' and '.join(read)}: write the reasoning there." if read else ""
        what = "reasoning" if key == "content" else key
        raise self._error(i, messages[i], what, thought, remedy)

    def check_keys(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises DataError for a key that was meant to be another, or to say what is learned."""
        for i, message in enumerate(messages):
            self._say_role(message.get("role"))
            said = [key for key, value in message.items() if value not in ("", [], {}) and key not in READ]
            unread = [key for key in said if key not in self.said and not reads_key(self.source, key)]
            for key in unread:
                if ABOUT_LOSS.fullmatch(key):
                    raise DataError(
                        f"message {i + 1} ({message.get('role')}): {key!r} is not read. Say by 'weight', 0 or 1, whether it is "
                        "learned from, or leave the key out."
                    )
                if (meant := meant_key(key)) is not None:
                    raise DataError(
                        f"message {i + 1} ({message.get('role')}): the key {key!r} is not read. Did you mean {meant!r}? Rename "
                        "it, or leave it out."
                    )
            self._say_keys(unread)

    def _say_keys(self, unread: Sequence[str]) -> None:
        if unread:
            self.said |= set(unread)
            logger.warning(
                f"Messages have keys that the chat template of {self.name!r} does not read: "
                f"{', '.join(map(repr, unread))}. What stands there is not learned."
            )

    def _say_role(self, role: Any) -> None:
        if role in KNOWN_ROLES or role in self.said or asks_for_role(self.source, str(role)):
            return
        self.said.add(role)
        logger.warning(
            f"Messages have the role {role!r}, which the chat template of {self.name!r} does not ask for: it is written as "
            "it stands, and is no answer of the assistant's. The roles are system, user, assistant and tool."
        )


def meant_key(key: str) -> str | None:
    """The key of those that are read for which this one is a slip in writing; None if it is like none of them."""
    bare = key.strip().lower().replace("-", "_")
    if bare in READ:
        return bare
    known = [name for name in READ if len(name) >= SHORTEST]
    near = difflib.get_close_matches(bare, known, n=1, cutoff=ALIKE) if len(bare) >= SHORTEST else []
    return near[0] if near else None


def _texts(content: Any) -> list[tuple[str, Any]]:
    """Each text of a content, and the content with that text changed; a content of parts may have several."""
    if isinstance(content, str):
        return [(content, content + CHANGE)]
    parts = content if isinstance(content, list) else []
    texts = [(k, part["text"]) for k, part in enumerate(parts) if part.get("type") == "text"]
    return [(said, [*parts[:k], {**parts[k], "text": said + CHANGE}, *parts[k + 1 :]]) for k, said in texts]


def _without_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with other arguments: those of none, or where it has none, as it is."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": {}}} if function.get("arguments") else dict(call)


def _reasoning(message: Message) -> tuple[str, str] | None:
    """Where and what the assistant thought: under a key of its own, or before `</think>` in the content."""
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
