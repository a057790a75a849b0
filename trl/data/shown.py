"""Whether a rendered conversation shows all that its messages say: their contents, calls of tools and reasoning.

What a template drops is found by rendering with and without it. Reasoning may be dropped once a turn is past, as many
templates do; the last that there is has to be shown where the conversation ends with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.data.messages import REASONING
from trl.errors import DataError

Message = Mapping[str, Any]
Messages = Sequence[Message]

LONG = 12
"""Letters of a content that no header or other message holds by chance."""
CHANGE = " ≠"
"""What is added to a content to see whether the rendering shows it."""
THOUGHT_ENDS = "</think>"
"""What ends reasoning inside a content."""


@dataclass
class ShownCheck:
    """The check of one template; `name` and `source` are for its errors."""

    name: str
    source: str
    known_roles: set[Any] = field(default_factory=set)
    """Roles whose contents the template has been seen to show."""

    def check(self, messages: Messages, text: str, render: Callable[[Messages], str]) -> None:
        """Raises DataError where something that a message says is not in `text`, their rendering.

        `render` makes such a text of changed messages.
        """
        for i, message in enumerate(messages):
            lost = next(
                (f for f in ("content", "tool_calls") if self._is_lost(messages, i, f, text, render)),
                None,
            )
            if lost is not None:
                raise self._error(i, message, lost, message[lost])

    def _error(self, i: int, message: Message, lost: str, value: Any, remedy: str = "") -> DataError:
        return DataError(
            f"message {i + 1} ({message.get('role')}): the chat template of {self.name!r} does not show its {lost}, "
            f"{str(value)[:60]!r}. {remedy or 'Take a template that does, write the message otherwise, or leave it out.'}"
        )

    def _is_lost(self, messages: Messages, i: int, name: str, text: str, render: Callable[[Messages], str]) -> bool:
        """Whether the rendering is the same without what message i says in this field."""
        message = messages[i]
        value = message.get(name)
        if not value or not isinstance(value, str | list) or (name == "content" and not isinstance(value, str)):
            return False
        if name == "content":
            bare = value.strip()
            repeats = sum(bare in m["content"] for m in messages if isinstance(m.get("content"), str))
            role = message.get("role")
            if not bare or (text.count(bare) >= repeats and (len(bare) >= LONG or role in self.known_roles)):
                return False
            changed = {**message, "content": f"{value}{CHANGE}"}
        else:
            names = [call["function"]["name"] for call in value if isinstance(call.get("function"), Mapping)]
            if names and all(each in text for each in names):
                return False
            changed = {key: kept for key, kept in message.items() if key != name}
        other = render([*messages[:i], changed, *messages[i + 1 :]])
        if name == "content" and other != text:
            self.known_roles.add(message.get("role"))
        return other == text

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
