"""A batch of rows as columns, with checks of their values whose errors name row and column."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trl.data.json_text import conversation_in, messages_of
from trl.data.messages import tidy_messages
from trl.errors import DataError, RowError

INT32 = 2**31

CHATS = ("prompt", "messages", "conversations", "completion", "chosen", "rejected")
"""Columns that may hold conversations."""


@dataclass(frozen=True)
class Columns:
    """A batch of rows as columns.

    rows        indices of the rows in the dataset; error messages count them from 1
    images      images of each row, if there is a processor for them: contents of messages are then lists of parts
    is_packed   whether a row has several documents
    source      source of the chat template
    """

    values: Mapping[str, Sequence[Any]]
    rows: Sequence[int]
    images: Sequence[Sequence[Any]] | None = None
    is_packed: bool = False
    source: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Sequence[Any]:
        return self.values[name]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows as dicts."""
        return ({name: self.values[name][k] for name in self.values} for k in range(len(self.rows)))

    def at(self, places: Sequence[int]) -> Columns:
        """The rows at these indices of the batch."""
        values = {name: [column[k] for k in places] for name, column in self.values.items()}
        images = None if self.images is None else [self.images[k] for k in places]
        return replace(self, values=values, rows=[self.rows[k] for k in places], images=images)

    def error(self, k: int, name: str, message: str) -> RowError:
        return RowError(self.rows[k], f", column {name!r}: {message}")

    def is_chat(self, name: str) -> bool:
        """True if the column holds conversations, judged by its first value that is not None."""
        return isinstance(next((value for value in self.values[name] if value is not None), None), list)

    def texts(self, name: str) -> Sequence[str]:
        """The values of a column that has to hold strings."""
        for k, value in enumerate(self.values[name]):
            if not isinstance(value, str):
                raise self.error(k, name, f"expected a string, found {describe(value)}.{_remedy(value)}")
            if wrong := lone_surrogate(value):
                raise self.error(k, name, wrong)
        return self.values[name]

    def chats(self, name: str, *, answers: bool = False) -> list[list[dict[str, Any]]]:
        """The values of a column that has to hold conversations; with `answers`, the last message is the assistant's."""
        chats = [self._chat(k, name, value) for k, value in enumerate(self.values[name])]
        for k, chat in enumerate(chats):
            if answers and chat[-1]["role"] != "assistant":
                found = f"the conversation ends with {chat[-1]['role']!r}"
                raise self.error(k, name, f"{found}, so there is no answer to train on. End it with the assistant.")
        return chats

    def spoken_chats(self, name: str) -> list[list[dict[str, Any]]]:
        """The values of a column that has to hold conversations, each with a message of the assistant."""
        chats = self.chats(name)
        for k, chat in enumerate(chats):
            if all(message["role"] != "assistant" for message in chat):
                roles = ", ".join(dict.fromkeys(message["role"] for message in chat))
                raise self.error(
                    k,
                    name,
                    f"it has no message of the assistant, so there is no answer to train on. Its roles: {roles}.",
                )
        return chats

    def read(self) -> Columns:
        """The columns with conversations that are JSON text or a dict of lists converted to lists of messages."""
        chats = {name: self.values[name] for name in CHATS if name in self.values}
        read = {name: [self._read(k, name, v) for k, v in enumerate(column)] for name, column in chats.items()}
        return replace(self, values={**self.values, **read})

    def _read(self, k: int, name: str, value: Any) -> Any:
        try:
            found = conversation_in(value) if isinstance(value, str) else messages_of(value)
        except DataError as error:
            raise self.error(k, name, str(error)) from error
        return value if found is None else found

    def _chat(self, k: int, name: str, value: Any) -> list[dict[str, Any]]:
        if value == []:
            raise self.error(k, name, "the conversation is empty. Give it a message, or remove such rows.")
        if not isinstance(value, list):
            raise self.error(k, name, f"expected a list of messages, found {describe(value)}.{_remedy(value)}")
        try:
            chat = tidy_messages(value, self.source) if self.images is None else value
        except DataError as error:
            raise self.error(k, name, str(error)) from error
        for i, message in enumerate(chat):
            if wrong := self._wrong(message, value[i]):
                raise self.error(k, name, f"message {i + 1}: {wrong}")
        return chat

    def _wrong(self, message: Any, given: Any) -> str:
        """What is wrong with a message, in words; empty if nothing is. `given` is the message as it is in the dataset."""
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'expected {{"role": …, "content": …}}, found {describe(given)}.'
        content = message.get("content")
        if isinstance(content, list) and self.images is None:
            return f"content has to be text, or a list of parts of type text; found {describe(content)}."
        return lone_surrogate(content) if isinstance(content, str) else ""

    def numbers(self, name: str) -> Sequence[Sequence[int]]:
        """The values of a column that has to hold lists of integers."""
        for k, value in enumerate(self.values[name]):
            if not isinstance(value, list):
                raise self.error(k, name, f"expected a list of integers, found {describe(value)}.")
            if value and np.asarray(value, dtype=object if None in value else None).dtype.kind not in "bi":
                i, wrong = next((i, v) for i, v in enumerate(value) if not isinstance(v, int) or abs(v) >= 2**63)
                raise self.error(k, name, f"expected a list of integers, found {describe(wrong)} at position {i + 1}.")
        return self.values[name]

    def ids(self, name: str, vocabulary: int | None) -> Sequence[Sequence[int]]:
        """The values of a column that has to hold token ids below the size of the vocabulary."""
        limit = min(vocabulary or INT32, INT32)
        for k, value in enumerate(self.numbers(name)):
            if value and not 0 <= min(value) <= max(value) < limit:
                i, wrong = next((i, v) for i, v in enumerate(value) if not 0 <= v < limit)
                raise self.error(
                    k,
                    name,
                    f"{wrong} at position {i + 1} is not a token id: they go from 0 to {limit - 1:,}, the last row of the model's "
                    "embedding. Were the rows made with another tokenizer?",
                )
        return self.values[name]

    def check_finite(self, name: str) -> None:
        """Raise RowError if a column of numbers has a NaN or an infinity."""
        for k, value in enumerate(self.values[name]):
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error(k, name, f"expected a finite number, found {value}.")

    def each(self, function: Callable[[int, dict[str, Any]], Any]) -> list[Any]:
        """`function(k, row)` for every row; a DataError from it is raised again with the row's number."""
        results = []
        for k, row in enumerate(self):
            try:
                results.append(function(k, row))
            except DataError as error:
                raise RowError(self.rows[k], f": {error}") from error
        return results


def lone_surrogate(text: str) -> str:
    """What is wrong with a text that has a lone surrogate, in words; empty for any other text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{text[error.start]!r} at position {error.start + 1} is half of a character (a lone surrogate)."
    return ""


def _remedy(value: Any) -> str:
    """What to do about a value of the wrong type, in words."""
    if value is None:
        return " Fill it in, or remove such rows; put rows of another kind into a separate dataset."
    if isinstance(value, int | float):
        return " Write numbers as texts: in quotes in a .jsonl file; in Python, cast_column(column, datasets.Value('string'))."
    if isinstance(value, str | list):
        return " A column holds either texts or conversations: write all of its rows in the same form."
    return ""


def describe(value: Any) -> str:
    """The type of a value and its beginning, for error messages."""
    text = repr(value)
    if value is None:
        return text
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"
