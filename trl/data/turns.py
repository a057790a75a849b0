"""Which characters of a rendered conversation the assistant wrote, where the template does not mark them.

A template renders messages m₁ … m_n as a text R(m₁…m_n); R⁺ adds the generation prompt. Turn i is what stands in the whole
text between R⁺(m₁…m_{i−1}) and R(m₁…m_i).

Often these are beginnings of the whole text. They are not where a template rewrites turns that are past: it drops their
reasoning, closes the last turn by a token of its own, or shows the system prompt with the last question. Then the two are
laid over each other at the message before the border: appending a mark to its content shows where that content ends in
each of them, and from there on both say the same up to the border.
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
"""What templates raise about messages, by themselves or in what they compute."""

MARK = "≠"
"""What is added to a content to see where the rendering shows it."""


@dataclass(frozen=True)
class Borders:
    """The tokens between the turns of a template: those that end one, and those of headers, and the header of an answer.

    EOS ends a turn.
    """

    enders: tuple[str, ...]
    openers: tuple[str, ...]
    header: str = ""

    @classmethod
    def of(cls, render: Callable[..., str], tokens: Sequence[str], eos: str) -> Borders:
        """The borders that a conversation of two questions and answers shows; `tokens` are all that may stand there."""
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
        """The end of the span, after a token that ends turns and follows it where nothing closes the span yet."""
        if text[start:end].rstrip().endswith(self.enders):
            return end
        return end + len(next((t for t in self.enders if text.startswith(t, end)), ""))


def _gaps(render: Callable[..., str], chat: Messages, marks: Sequence[str]) -> list[str]:
    """What stands before the first content, after questions, after an answer, and after the last answer."""
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
        opened, bare = opened.lstrip(), bare.strip()  # blank space after the last turn alone
        return opened.removeprefix(bare).lstrip() if opened.startswith(bare) else ""
    return opened.removeprefix(bare)


def _leading(text: str, tokens: Sequence[str]) -> Iterator[str]:
    """The tokens with which a text begins, one after the other."""
    while token := _first(text, tokens):
        yield token
        text = text.lstrip().removeprefix(token)


def _first(text: str, tokens: Sequence[str]) -> str | None:
    """The token with which a text begins, after blank space; the longest of several."""
    text = text.lstrip()
    return max((t for t in tokens if t and text.startswith(t)), key=len, default=None)


@dataclass(frozen=True)
class TurnFinder:
    """The turns of the assistant in a conversation.

    render   from messages, and `add_generation_prompt`, to text
    tokens   added tokens of the tokenizer: only these close turns
    borders  which of them end a turn, and which stand in headers
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
        """Where the answer to the first messages `before` begins, after what the template writes of its header: in their
        rendering with the generation prompt, and in the text.

        A generation prompt that says more than the header of this turn (an opened block of reasoning, say) counts up to
        the last line end or token that both share.
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
        """Where an answer begins that nothing is before: behind the last header before what it says.

        Many templates look at the first message, or write a header after one alone, and cannot be asked without any.
        """
        message, header = self.messages[0], self.borders.header
        content = message.get("content")
        if not header or not isinstance(content, str):
            return None
        marked = self.render([{**message, "content": f"{MARK}{content}"}, *self.messages[1:]])
        at = self.text.rfind(header, 0, _shared_length(self.text, marked))
        return None if at < 0 else (at + len(header), at + len(header))

    def _after_header(self, prompt: str, here: int, there: int) -> Span | None:
        """The last line end or token up to which the prompt and the text say the same, from these places on.

        Blank space there may differ: some templates write it after turns alone that another follows.
        """
        here, there = _after_blank(prompt, here), _after_blank(self.text, there)
        shared = _shared_length(prompt[here:], self.text[there:])
        ends = (i for i in range(shared, 0, -1) if prompt[here : here + i].endswith(("\n", *self.tokens)))
        return next(((here + i, there + i) for i in ends), None)

    def _end(self, upto: Messages) -> int | None:
        """Where the last of the messages `upto` ends."""
        rendered = self.render(upto)
        end = self._shared_end(rendered, 0)
        if end is None and (place := self._anchor(upto, rendered)) is not None:
            end = self._shared_end(rendered[place[0] :], place[1])
        return end

    def _shared_end(self, rendered: str, at: int) -> int | None:
        """Where in the text from `at` on the rendering of a last turn ends.

        Some templates close the last turn otherwise than earlier ones, or the whole by a token of its own: what their
        rendering is closed by need not be in the text, but another token that ends turns may stand there instead.
        """
        kept = rendered
        while not self.text.startswith(kept, at):
            kept = kept.rstrip()
            token = max((t for t in self.tokens if kept.endswith(t)), key=len, default=None)
            if token is None:
                return None
            kept = kept.removesuffix(token)
        end = at + len(kept)
        return end if kept == rendered else self.borders.stopped(self.text, at, end)

    def _closed(self, start: int, end: int) -> Span:
        """The span up to the token that ends the turn, without the blank space that templates write after it."""
        end = self.borders.stopped(self.text, start, end)
        while opener := next((o for o in self.borders.openers if self.text[start:end].rstrip().endswith(o)), None):
            end = start + len(self.text[start:end].rstrip().removesuffix(opener))  # of the next turn's header
        trimmed = start + len(self.text[start:end].rstrip())
        return (start, trimmed) if self.text[start:trimmed].endswith(self.tokens) else (start, end)

    # ---- laying renderings over each other ----

    def _anchor(self, before: Messages, rendered: str, **options: Any) -> Span | None:
        """Where the last of the messages `before` has been said: in their rendering, and in the text."""
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
    """The message with the mark at the end of what it says: of its content, else of the name of the tool it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        yield {**message, "content": [*content, {"type": "text", "text": MARK}]}
    else:
        yield {**message, "content": f"{content or ''}{MARK}"}
    if isinstance(calls, list) and calls and isinstance(function := calls[0].get("function"), Mapping):
        named = {**calls[0], "function": {**function, "name": f"{function.get('name')}{MARK}"}}
        yield {**message, "tool_calls": [named, *calls[1:]]}


def _inserted(text: str, changed: str) -> int | None:
    """Where the mark stands in a text that is otherwise the same; None where more is different."""
    at = _shared_length(text, changed)
    blank, mark, rest = changed[at:].partition(MARK)
    return at if mark and not blank.strip() and rest == text[at:] else None


def _shared_length(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
