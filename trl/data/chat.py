"""Render conversations to text with chat templates, and find the spans of characters that the assistant wrote.

A chat template renders messages m₁ … m_n as a text R(m₁…m_n); R⁺ adds the generation prompt, the header after which
the model writes. The assistant's turns are found in one of two ways:

- the template marks them itself, by `{% generation %}` blocks;
- turn by turn, by comparing the renderings of the first messages and of all messages: see `trl.data.turns`.

A span includes the token that ends the turn, without which a model would not learn to stop, but not the generation
prompt, which the model never writes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trl.data.formats import Row, is_conversational
from trl.data.json_text import decoded
from trl.data.messages import KNOWN_ROLES, check_contents, contents_as_parts, is_trained, tidy_messages, without_none
from trl.data.shown import ShownCheck
from trl.data.tool_calls import arguments_as_text, tools_of
from trl.data.turns import MARK, TEMPLATE_ERRORS, Borders, TurnFinder
from trl.errors import ConfigError, DataError, suggest

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]
Span = tuple[int, int]

logger = logging.getLogger(__name__)

_BARE: Row = MappingProxyType({})
NOT_ASSISTANT = tuple(role for role in KNOWN_ROLES if role != "assistant")

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A tokenizer's chat template: renders conversations, and finds the assistant's turns in them.

    `tools` and `template_kwargs` are passed to every rendering; a row may override them. `chat_template` replaces the
    tokenizer's template, for processors with a template of their own.

    Raises ConfigError if there is no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tools: Tools | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        if not (chat_template or tokenizer.chat_template):
            raise ConfigError(
                f"The rows are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template. Give it one with "
                "chat_template_path (--chat_template_path): the name of a chat model, or a .jinja file. Or start from a chat model."
            )
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.name = tokenizer.name_or_path
        self.tools = tools
        self.template_kwargs = {**tokenizer.special_tokens_map, **(template_kwargs or {})}
        self.eos = tokenizer.eos_token or ""
        self._shown = ShownCheck(self.name, self.source(tools))
        self._unread: set[str] = set()
        self._say_unread(template_kwargs or {})
        self._is_open = self._is_unanswered = False
        self.tokens = tuple(map(str, tokenizer.added_tokens_decoder.values()))

    @property
    def is_marked(self) -> bool:
        """True if the template marks the assistant's turns by `{% generation %}` blocks."""
        return _GENERATION_MARK.search(self.source(self.tools)) is not None

    @cached_property
    def reads_parts(self) -> bool:
        """True if the template renders contents only if they are lists of parts, as some templates of vision models do."""
        message = {"role": "user", "content": MARK}
        shown = []
        for messages in ([message], contents_as_parts([message])):
            try:
                (text,), _ = render_jinja_template(
                    conversations=[messages],
                    chat_template=self.source(self.tools),
                    tools=self.tools,
                    **self.template_kwargs,
                )
            except TEMPLATE_ERRORS:
                text = ""
            shown.append(MARK in text and "'type'" not in text)
        return shown == [False, True]

    @cached_property
    def borders(self) -> Borders:
        """The tokens between turns."""
        return Borders.of(
            lambda m, **options: self._rendered(m, _BARE, mark=False, **options)[0], self.tokens, self.eos
        )

    def source(self, tools: Tools | None) -> str:
        """The template's source; some tokenizers have a separate template for conversations with tools."""
        return self.chat_template or self.tokenizer.get_chat_template(tools=tools)

    def render(
        self, messages: Messages, row: Row = _BARE, *, mark: bool = False, **options: Any
    ) -> tuple[str, list[Span]]:
        """Render a conversation to text; with `mark`, also return the spans that the template marks.

        `row` may have its own `tools` and `chat_template_kwargs`. `options` are passed to the template
        (`add_generation_prompt`, `continue_final_message`).

        Raises DataError if the template cannot render the messages.
        """
        try:
            try:
                return self._rendered(messages, row, mark=mark, **options)
            except TypeError:  # some templates expect the arguments of tool calls as text
                if (written := arguments_as_text(messages)) == list(messages):
                    raise
                return self._rendered(written, row, mark=mark, **options)
        except DataError:
            raise
        except TEMPLATE_ERRORS as error:
            raise self._cannot_render(messages, error) from error

    def _rendered(self, messages: Messages, row: Row, *, mark: bool, **options: Any) -> tuple[str, list[Span]]:
        tools = _row_tools(row) or self.tools
        given = _row_options(row)
        self._say_unread(given)
        texts, spans = render_jinja_template(
            conversations=[contents_as_parts(messages) if self.reads_parts else messages],
            chat_template=self.source(tools),
            tools=tools,
            return_assistant_tokens_mask=mark,
            **{**self.template_kwargs, **given, **options},
        )
        return texts[0], spans[0] if mark else []

    def _say_unread(self, options: Mapping[str, Any]) -> None:
        """Warn once about each option of `chat_template_kwargs` whose name does not occur in the template."""
        source = self.source(self.tools)
        for name in options.keys() - self._unread:
            if re.search(rf"\b{re.escape(name)}\b", source) is None:
                self._unread.add(name)
                near = suggest(name, set(re.findall(r"[a-z]\w{4,}", source)))
                logger.warning(f"chat_template_kwargs: the chat template of {self.name!r} does not use {name!r}.{near}")

    def _cannot_render(self, messages: Messages, error: Exception) -> DataError:
        check_contents(messages, self.source(self.tools))
        roles = ", ".join(str(message.get("role")) for message in messages) or "none"
        return DataError(f"The chat template of {self.name!r} cannot render messages of roles {roles}: {error}.")

    def whole(self, messages: Messages, row: Row = _BARE) -> str:
        """The text of a conversation that is trained on as a whole. Raises DataError if a message is excluded from training."""
        left_out = next((i for i, message in enumerate(messages) if not is_trained(message)), None)
        if left_out is not None:
            raise DataError(
                f"message {left_out + 1} is excluded from training by its weight, but here whole conversations are trained on: set "
                "assistant_only_loss=True, or remove the key."
            )
        text = self._all_shown(messages, self.render(messages, row)[0], row)
        self._check_answered(messages)
        if messages[-1].get("role") == "assistant":
            self._check_closed(text)
        return text

    def _check_answered(self, messages: Messages) -> None:
        """Warn once if a conversation has no message of the assistant: a model would learn from it to write the user's."""
        if not self._is_unanswered and all(message.get("role") in NOT_ASSISTANT for message in messages):
            self._is_unanswered = True
            logger.warning(
                f"A conversation has no message of the assistant, only of {messages[-1]['role']!r} (the last one begins with "
                f"{str(messages[-1].get('content'))[:30]!r}): a model learns from it to write such messages. "
                "Remove such rows, unless that is meant."
            )

    def _check_closed(self, answer: str) -> None:
        """Warn once if the template writes no token that ends the assistant's turns."""
        if not self._is_open and not answer.rstrip().endswith((*self.tokens, *filter(None, [self.eos]))):
            self._is_open = True
            logger.warning(
                f"The chat template of {self.name!r} writes no token that ends a turn: an answer ends with {answer[-20:]!r}, so "
                "that the model will not learn to stop. Use a template that ends the assistant's turns with a token."
            )

    def _all_shown(self, messages: Messages, text: str, row: Row, **options: Any) -> str:
        """Return `text`, the rendering of `messages`. Raises DataError if it does not show all contents of the messages."""
        check_contents(messages, self.source(self.tools))
        self._shown.check_keys(messages)
        self._shown.check(messages, text, lambda changed: self.render(changed, row, **options)[0])
        if tools := _row_tools(row):
            bare = {**row, "tools": None, "functions": None}
            self._shown.check_tools(tools, text, lambda: self.render(messages, bare, **options)[0])
        self._shown.check_reasoning(messages, lambda part: self.render(part, row)[0])
        return text

    def prompt(self, messages: Messages, row: Row = _BARE) -> str:
        """The text of a prompt: it ends with the generation prompt, or with the assistant's unfinished last message."""
        if messages[-1]["role"] == "assistant":
            if before := messages[:-1]:
                self._all_shown(before, self.render(before, row)[0], row)
            return self.render(messages, row, continue_final_message=True)[0]
        text = self.render(messages, row, add_generation_prompt=True)[0]
        return self._all_shown(messages, text, row, add_generation_prompt=True)

    def answers(self, prompt: Messages, answers: Sequence[Messages], row: Row = _BARE) -> tuple[str, list[str]]:
        """The text of a prompt, and the texts of its answers; prompt and answer together are the rendered conversation.

        If the template renders the header of an answer differently once there is an answer (with an empty reasoning block,
        say), the prompt ends where the headers begin to differ.

        Raises DataError if the rendered prompt is not the beginning of the rendered conversation.
        """
        opened = self.render(prompt, row, add_generation_prompt=True)[0]
        finders = [self._finder([*prompt, *answer], row) for answer in answers]
        for finder in finders:
            self._all_shown(finder.messages, finder.text, row)
        borders = [finder.start(prompt) for finder in finders]
        if None in borders:
            raise DataError(
                f"The chat template of {self.name!r} renders a prompt differently once an answer follows, so that the "
                "border between prompt and answer is unknown. Use a template that does not rewrite earlier messages."
            )
        self._check_closed(finders[0].text)
        end = min(here for here, _ in borders)
        return opened[:end], [f.text[there - (here - end) :] for f, (here, there) in zip(finders, borders, strict=True)]

    def assistant_spans(self, messages: Messages, row: Row = _BARE) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans [start, end) of the characters that the assistant wrote.

        Raises DataError if the template does not mark the spans, and they cannot be found by comparing renderings.
        """
        if self.is_marked:
            text, marked = self.render(messages, row, mark=True)
            self._all_shown(messages, text, row)
            limits = [*(start for start, _ in marked), len(text)][1:]
            ends = [min(limit, self.borders.stopped(text, *s)) for s, limit in zip(marked, limits, strict=True)]
            return text, self._trained(messages, text, [(s, end) for (s, _), end in zip(marked, ends, strict=True)])
        finder = self._finder(messages, row)
        text = self._all_shown(messages, finder.text, row)
        if (spans := finder.spans()) is None:
            raise DataError(self._cannot_be_masked())
        return text, self._trained(messages, text, spans)

    def _finder(self, messages: Messages, row: Row) -> TurnFinder:
        def render(part: Messages, **options: Any) -> str:
            return self.render(part, row, **options)[0]

        return TurnFinder(messages, render, self.tokens, self.borders)

    def _trained(self, messages: Messages, text: str, spans: list[Span]) -> list[Span]:
        """The spans of the assistant's turns, without those that a message's weight excludes from training."""
        for start, end in spans[-1:]:
            self._check_closed(text[start:end])
        trained = [is_trained(message) for message in messages if message["role"] == "assistant"]
        if all(trained):
            return spans
        if len(spans) != len(trained):
            raise DataError(
                f"the assistant has {len(trained)} turns, but the chat template of {self.name!r} marks {len(spans)} spans, so "
                "that a turn cannot be excluded by its weight: remove it from the row."
            )
        return [span for span, learned in zip(spans, trained, strict=True) if learned]

    def _cannot_be_masked(self) -> str:
        source = self.source(self.tools)
        head = source if len(source) <= 80 else f"{source[:80]}…"
        return (
            f"The chat template of {self.name!r} ({head!r}) does not show which text the assistant wrote: it has no "
            "{% generation %} marks, and rewrites earlier turns when later ones follow. Put {% generation %} … "
            "{% endgeneration %} around the assistant's part of the template, write the rows as prompt and completion, "
            "or train on whole conversations with assistant_only_loss=False."
        )


def _row_tools(row: Row) -> Tools | None:
    """The tools of a row, from its column `tools`, or from `functions` as in OpenAI's older files."""
    tools = tools_of(row.get("tools"))
    if tools is None and isinstance(functions := row.get("functions"), list):
        tools = [{"type": "function", "function": function} for function in functions]
    return without_none(tools)


def _row_options(row: Row) -> dict[str, Any]:
    """The row's own `chat_template_kwargs`."""
    options = without_none(decoded(row.get("chat_template_kwargs") or None, "column 'chat_template_kwargs': it"))
    if not isinstance(options or {}, Mapping):
        raise DataError(f"column 'chat_template_kwargs': expected a mapping, found a {type(options).__name__}.")
    return dict(options or {})


def apply_chat_template(
    example: Row,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tools: Tools | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Render a conversational row to text: `messages` becomes `text`, other columns keep their names; a `label` is kept.

    A prompt ends with the generation prompt, or with the assistant's unfinished message if that is its last one; a completion
    is the rest of the rendered conversation. `processing_class` is an alias of `tokenizer`.

    Raises DataError for a row whose columns are not those of a conversation.
    """
    tokenizer = tokenizer if tokenizer is not None else processing_class
    if tokenizer is None:
        raise ConfigError("apply_chat_template needs a tokenizer. Give tokenizer=.")
    template = ChatTemplate(tokenizer, tools=tools, template_kwargs=template_kwargs)
    if "messages" in example:
        return {"text": template.whole(tidy_messages(example["messages"]), example)}
    label = {"label": example["label"]} if "label" in example else {}
    answers = {name: example[name] for name in ("completion", "chosen", "rejected") if name in example}
    if "prompt" not in example:
        return {name: template.render(tidy_messages(answer), example)[0] for name, answer in answers.items()} | label
    prompt = tidy_messages(example["prompt"])
    if prompt[-1]["role"] not in ("user", "assistant", "tool"):
        raise DataError(
            f"The prompt ends with a message of role {prompt[-1]['role']!r}: it has to end with the user, a tool or the assistant."
        )
    if not answers:
        return {"prompt": template.prompt(prompt, example)}
    text, texts = template.answers(prompt, [tidy_messages(answer) for answer in answers.values()], example)
    return {"prompt": text, **dict(zip(answers, texts, strict=True)), **label}


def maybe_apply_chat_template(
    example: Row,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tools: Tools | None = None,
    **options: Any,
) -> Row:
    """`apply_chat_template` for a conversational row; any other row is returned unchanged."""
    return apply_chat_template(example, tokenizer, tools, **options) if is_conversational(example) else example
