"""Find the assistant's turns in a rendered conversation whose template does not mark them.

A template renders messages m₁ … m_n as a text R(m₁…m_n); R⁺ adds the generation prompt. Turn i is the part of the whole
text R(m₁…m_n) between R⁺(m₁…m_{i−1}) and R(m₁…m_i).

Usually both of these are prefixes of the whole text. They are not if the template rewrites earlier turns: it drops their
reasoning, ends only the last turn with a certain token, or shows the system prompt with the last question. Then the partial
and the whole rendering are aligned at the message before the border: a mark appended to its content shows where that content
ends in both, and from there on both are equal up to the border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

Message = Mapping[str, Any]
Messages = Sequence[Message]
Span = tuple[int, int]

TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)
"""Errors that rendering may raise, by the template itself or by Python operations in it."""

MARK = "≠"
"""Text inserted into a content, to see where it is in the rendering."""


@dataclass(frozen=True)
class Borders:
    """The tokens between the turns of a template.

    enders    tokens that end a turn; EOS is one of them
    openers   tokens in the headers of turns
    header    the header of an answer, which is the generation prompt
    """

    enders: tuple[str, ...]
    openers: tuple[str, ...]
    header: str = ""

    @classmethod
    def of(cls, render: Callable[..., str], tokens: Sequence[str], eos: str) -> Borders:
        """The borders, found by rendering a conversation of two questions and answers; `tokens` are the candidates."""
        marks = [f"{MARK}{i}{MARK}" for i in range(4)]
        chat = [
            {"role": ("user", "assistant")[i % 2], "content": mark, "reasoning_content": ""}
            for i, mark in enumerate(marks)
        ]
        head, asked, answered, footer = _gaps(render, chat, marks)
        header = _generation_prompt(render, chat[:1])
        closes_question = asked.removesuffix(asked[asked.find(header) :]) if header and header in asked else ""
        leading = tuple(takewhile(head.__contains__, _leading(head, tokens)))
        found = [_first(text, tokens) for text in (footer, closes_question)]
        enders = tuple(dict.fromkeys([*(t for t in found if t and t not in leading), *([eos] if eos else [])]))
        headers = head + header + answered + asked + footer
        return cls(enders, tuple(t for t in tokens if t in headers and t not in enders), header)

    def stopped(self, text: str, start: int, end: int) -> int:
        """The end of the span, moved behind a following token that ends turns, unless the span already ends with one."""
        if text[start:end].rstrip().endswith(self.enders):
            return end
        return end + len(next((t for t in self.enders if text.startswith(t, end)), ""))


def _gaps(render: Callable[..., str], chat: Messages, marks: Sequence[str]) -> list[str]:
    """The rendered text before the first content, after a question, after an answer, and after the last message."""
    for last in (4, 2, 1):
        for first in (0, 1):
            try:
                text = render(chat[first:last])
            except TEMPLATE_ERRORS:
                continue
            gaps = [""] * 4
            for i in range(first, last):
                before, found, text = text.partition(marks[i])
                gaps[min(i - first, 2)] = before if found else ""
            return [*gaps[:3], text]
    return [""] * 4


def _generation_prompt(render: Callable[..., str], chat: Messages) -> str:
    try:
        bare, opened = render(chat), render(chat, add_generation_prompt=True)
    except TEMPLATE_ERRORS:
        return ""
    if not opened.startswith(bare):
        opened, bare = opened.lstrip(), bare.strip()  # there may be blank space after a last turn only
        return opened.removeprefix(bare).lstrip() if opened.startswith(bare) else ""
    return opened.removeprefix(bare)


def _leading(text: str, tokens: Sequence[str]) -> Iterator[str]:
    """The tokens at the beginning of a text, one after the other."""
    while token := _first(text, tokens):
        yield token
        text = text.lstrip().removeprefix(token)


def _first(text: str, tokens: Sequence[str]) -> str | None:
    """The token with which a text begins after blank space (the longest, if several match), or None."""
    text = text.lstrip()
    return max((t for t in tokens if t and text.startswith(t)), key=len, default=None)


@dataclass(frozen=True)
class TurnFinder:
    """Finds the assistant's turns in a conversation.

    render   renders messages to text, optionally with `add_generation_prompt`
    tokens   added tokens of the tokenizer; only these can end a turn
    borders  which of them end turns, and which are in headers
    """

    messages: Messages
    render: Callable[..., str]
    tokens: tuple[str, ...]
    borders: Borders

    @cached_property
    def text(self) -> str:
        return self.render(self.messages)

    def spans(self) -> list[Span] | None:
        """The turns [start, end) in `text`, each with the token that ends it; None if one is not found."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        spans = [self._turn(i) for i in turns]
        return None if None in spans else spans

    def _turn(self, i: int) -> Span | None:
        start = self.start(self.messages[:i])
        is_last = i + 1 == len(self.messages)
        end = len(self.text) if is_last else self._end(self.messages[: i + 1])
        if start is None or end is None or end < start[1]:
            return None
        return self._closed(start[1], end)

    # ---- borders ----

    def start(self, before: Messages) -> Span | None:
        """Where the answer to the first messages `before` begins, after its header: as a place in their rendering with the
        generation prompt, and as a place in the whole text.

        If the generation prompt has more than the header of this turn (the beginning of a reasoning block, say), the answer
        begins after the last line end or token that both have in common.
        """
        if not before and (first := self._first_start()) is not None:
            return first
        prompt = self.render(before, add_generation_prompt=True)
        if self.text.startswith(prompt):
            return len(prompt), len(prompt)
        bare = self.render(before).rstrip()
        if self.text.startswith(bare) and prompt.startswith(bare):
            here = there = 0
        elif place := self._anchor(before, prompt, add_generation_prompt=True):
            here, there = place
            follows_answer = any(message["role"] == "assistant" for message in before)
            if not (follows_answer or any(token in self.text[there:] for token in self.borders.enders)):
                return None
            if self.text.startswith(prompt[here:], there):
                return len(prompt), there + len(prompt) - here
        else:
            return None
        footer = bare[here:]
        if not (prompt.startswith(footer, here) and self.text.startswith(footer, there)):
            return None
        return self._after_header(prompt, here + len(footer), there + len(footer))

    def _first_start(self) -> Span | None:
        """Where an answer that is the first message begins: after the last header before its content.

        Many templates cannot render an empty list of messages, since they look at the first one, or write a header only after
        a message.
        """
        message, header = self.messages[0], self.borders.header
        content = message.get("content")
        if not header or not isinstance(content, str):
            return None
        marked = self.render([{**message, "content": f"{MARK}{content}"}, *self.messages[1:]])
        at = self.text.rfind(header, 0, _shared_length(self.text, marked))
        return None if at < 0 else (at + len(header), at + len(header))

    def _after_header(self, prompt: str, here: int, there: int) -> Span | None:
        """The last line end or token up to which the prompt and the text are equal, from the places `here` and `there` on.

        Leading blank space may differ, since some templates write it only between turns.
        """
        here, there = _after_blank(prompt, here), _after_blank(self.text, there)
        shared = _shared_length(prompt[here:], self.text[there:])
        ends = (i for i in range(shared, 0, -1) if prompt[here : here + i].endswith(("\n", *self.tokens)))
        return next(((here + i, there + i) for i in ends), None)

    def _end(self, upto: Messages) -> int | None:
        """Where the last of the messages `upto` ends in the text."""
        rendered = self.render(upto)
        end = self._shared_end(rendered, 0)
        if end is None and (place := self._anchor(upto, rendered)) is not None:
            end = self._shared_end(rendered[place[0] :], place[1])
        return end

    def _shared_end(self, rendered: str, at: int) -> int | None:
        """Where `rendered`, whose last turn is the turn in question, ends in the text from `at` on; None if it is not there.

        Some templates end the last turn, or the whole conversation, with a token of its own, which the text does not have
        there: then the turn ends before it, or with another token (see `_closed`).
        """
        kept = rendered
        while not self.text.startswith(kept, at):
            kept = kept.rstrip()
            token = max((t for t in self.tokens if kept.endswith(t)), key=len, default=None)
            if token is None:
                return None
            kept = kept.removesuffix(token)
        return at + len(kept)

    def _closed(self, start: int, end: int) -> Span:
        """The span with the token that ends the turn, but without the blank space and the next header after it."""
        end = self.borders.stopped(self.text, start, end)
        while opener := next((o for o in self.borders.openers if self.text[start:end].rstrip().endswith(o)), None):
            end = start + len(
                self.text[start:end].rstrip().removesuffix(opener)
            )  # it belongs to the next turn's header
        trimmed = start + len(self.text[start:end].rstrip())
        return (start, trimmed) if self.text[start:trimmed].endswith(self.tokens) else (start, end)

    # ---- aligning renderings ----

    def _anchor(self, before: Messages, rendered: str, **options: Any) -> Span | None:
        """Where the content of the last of the messages `before` ends: in their rendering, and in the whole text."""
        changes = _changed(before[-1]) if before else ()
        after = self.messages[len(before) :]
        for changed in changes:
            try:
                there = _inserted(self.text, self.render([*before[:-1], changed, *after]))
                here = _inserted(rendered, self.render([*before[:-1], changed], **options))
            except TEMPLATE_ERRORS:
                continue
            if here is not None and there is not None:
                return here, there
        return None


def _after_blank(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())


def _changed(message: Message) -> Iterator[dict[str, Any]]:
    """The message with the mark at the end of its content, then with the mark after the name of the tool that it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        yield {**message, "content": [*content, {"type": "text", "text": MARK}]}
    else:
        yield {**message, "content": f"{content or ''}{MARK}"}
    if isinstance(calls, list) and calls and isinstance(function := calls[0].get("function"), Mapping):
        named = {**calls[0], "function": {**function, "name": f"{function.get('name')}{MARK}"}}
        yield {**message, "tool_calls": [named, *calls[1:]]}


def _inserted(text: str, changed: str) -> int | None:
    """Where the mark was inserted into the text to give `changed`; None if they differ in anything else."""
    at = _shared_length(text, changed)
    blank, mark, rest = changed[at:].partition(MARK)
    return at if mark and not blank.strip() and rest == text[at:] else None


def _shared_length(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
