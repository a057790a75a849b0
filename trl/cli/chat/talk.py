"""A conversation, and the interface of the models that answer in it.

    messages ──speaker.answer──▶ pieces of text as they are generated ──say──▶ the screen and the conversation

A speaker raises TooLong for messages that exceed its context; the session then drops the oldest turn and asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trl.cli.chat.arguments import Generation
from trl.errors import TrlError

Message = dict[str, Any]
"""Role and content; the content is a text, or a list of parts with image paths and a text."""
Say = Callable[[str], None]


class TooLong(TrlError):
    """The messages do not fit in the model's context."""


class Speaker(Protocol):
    """A model that answers, in this process or on a server. `notes` are shown to the user at the start."""

    name: str
    details: str
    notes: Sequence[str]

    def answer(self, messages: Sequence[Message], generation: Generation, say: Say) -> int:
        """Pass the answer to `say` piece by piece. Return its number of tokens, or 0 if unknown.

        Raises TooLong for messages that leave no room for an answer.
        """
        ...

    def check_reads_images(self) -> None:
        """Raises ModelError for a model that is known to be text-only."""
        ...


@dataclass
class Conversation:
    """The messages so far. `start` is the first one that the model still sees; earlier ones are kept for `save`."""

    messages: list[Message] = field(default_factory=list)
    start: int = 0

    def add(self, role: str, content: Any) -> None:
        self.messages.append({"role": role, "content": content})

    def seen(self, system_prompt: str | None) -> list[Message]:
        """The messages that the model sees, the system prompt first."""
        before = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*before, *self.messages[self.start :]]

    def drop_oldest(self) -> bool:
        """Drop the oldest turn, up to the user's next message. Return False if only the last message is left."""
        later = [i for i in range(self.start + 1, len(self.messages)) if self.messages[i]["role"] == "user"]
        if not later:
            return False
        self.start = later[0]
        return True


class Stream:
    """Forwards text to `say` until a stop text. Text that may be the beginning of a stop text is held back.

    `text` is all that was forwarded. `stopped` is True after a stop text.
    """

    def __init__(self, say: Say, stop: Sequence[str] | None) -> None:
        self.say, self.stop = say, tuple(stop or ())
        self.text, self.held, self.stopped = "", "", False

    def put(self, piece: str) -> None:
        if self.stopped:
            return
        self.held += piece
        found = [self.held.find(each) for each in self.stop if each in self.held]
        if found:
            self.stopped = True
            self._say(min(found))
        else:
            self._say(len(self.held) - max((_overlap(self.held, each) for each in self.stop), default=0))

    def end(self) -> None:
        """Forward the text that was held back."""
        if not self.stopped:
            self._say(len(self.held))

    def _say(self, length: int) -> None:
        said, self.held = self.held[:length], self.held[length:]
        self.text += said
        if said:
            self.say(said)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
