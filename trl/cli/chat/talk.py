"""A conversation, and what speaks in it.

    messages ──speaker.answer──▶ pieces of text, as they are made ──say──▶ the screen, and the conversation

A speaker that finds the messages too long says so; the oldest turn is left out, and it is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trl.cli.chat.arguments import Generation
from trl.errors import TrlError

Message = dict[str, Any]
"""Role and content: a text, or parts with the paths of images and a text."""
Say = Callable[[str], None]


class TooLong(TrlError):
    """Messages that do not fit the model's context."""


class Speaker(Protocol):
    """What answers: a model in this process, or one on a server. `notes` are to be told to the user at the start."""

    name: str
    details: str
    notes: Sequence[str]

    def answer(self, messages: Sequence[Message], generation: Generation, say: Say) -> int:
        """Give the answer to `say` piece by piece. Returns how many tokens it had, or 0 if that is not known.

        Raises TooLong for messages that leave no room for an answer.
        """
        ...

    def check_reads_images(self) -> None:
        """Raises ModelError for a model that is known to read texts alone."""
        ...


@dataclass
class Conversation:
    """What was said. `start` is the first message that the model still sees; earlier ones are kept for `save`."""

    messages: list[Message] = field(default_factory=list)
    start: int = 0

    def add(self, role: str, content: Any) -> None:
        self.messages.append({"role": role, "content": content})

    def seen(self, system_prompt: str | None) -> list[Message]:
        """What the model sees, the system prompt first."""
        before = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*before, *self.messages[self.start :]]

    def drop_oldest(self) -> bool:
        """Leave out the oldest turn, up to the user's next message; False where only the last message is left."""
        later = [i for i in range(self.start + 1, len(self.messages)) if self.messages[i]["role"] == "user"]
        if not later:
            return False
        self.start = later[0]
        return True


class Stream:
    """Text on its way to `say`: what might yet become a stop text is held back, and nothing follows one.

    `text` is what was said. `stopped` is set once a stop text was reached.
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
        """Say what was held back."""
        if not self.stopped:
            self._say(len(self.held))

    def _say(self, length: int) -> None:
        said, self.held = self.held[:length], self.held[length:]
        self.text += said
        if said:
            self.say(said)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
