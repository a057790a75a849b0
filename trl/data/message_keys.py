"""Whether all keys and roles of messages are read: by the chat template, or by training.

A key that looks like one that is read, or says what is learned in a way that is not read, is an error; any other is said once.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.data.messages import ABOUT_MESSAGE, KNOWN_ROLES, REASONING, asks_for_role, reads_key
from trl.errors import DataError

logger = logging.getLogger(__name__)

READ = ("content", "tool_calls", "function_call", *REASONING, *ABOUT_MESSAGE)
"""Keys that templates or training read."""

ABOUT_LOSS = re.compile(r"train(ing|able|ed|_detail)|learn|loss(_mask)?|mask(ed)?|labels")
"""Keys by which other tools say what is learned, each in its own way."""

ALIKE = 0.8
"""Likeness from which on one name is taken for a slip in writing another."""
SHORTEST = 4
"""Letters of names that are compared: shorter ones are alike by chance."""


@dataclass
class KeyCheck:
    """The check of one template; `name` and `source` are for its words."""

    name: str
    source: str
    said: set[str] = field(default_factory=set)
    """Keys and roles that have been said not to be read."""

    def check(self, messages: Sequence[Mapping[str, Any]]) -> None:
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
