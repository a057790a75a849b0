"""Convert rows in the column conventions of other tools to the columns that are used here.

    instruction, input, output [, history, system]          prompt, completion          alpaca
    instruction, context, response                          prompt, completion          Dolly
    question | query, answer | response | output            prompt, completion
    question | instruction …, chosen, rejected              prompt, chosen, rejected
    conversations, chosen {…}, rejected {…} [, system]      prompt, chosen, rejected    LLaMA-Factory, axolotl
    chosen, rejected = "\\n\\nHuman: … \\n\\nAssistant: …"      prompt, chosen, rejected    HH
    input {messages}, preferred_output, non_preferred_…     prompt, chosen, rejected    OpenAI
    instruction … | conversations, kto_tag                  prompt, completion, label   LLaMA-Factory
    system | system_prompt, with any of them                the first message, or the beginning of the prompt

Questions and answers become conversations if the tokenizer has a chat template, else texts. Other columns are kept.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset

from trl.data.columns import describe
from trl.data.formats import TEXT, extract_prompt, maybe_extract_prompt
from trl.data.json_text import conversation_in
from trl.data.messages import tidy_messages
from trl.errors import DataError, RowError

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Rows = Dataset | IterableDataset

ASKED = ("instruction", "question", "query", "prompt", "input")
"""Columns that may hold the question; the first of them that exists is used, unless `prompt` stands beside what it needs."""
ANSWERED = ("completion", "output", "answer", "response")
CHATS = ("messages", "conversations", "conversation")
PAIR = ("chosen", "rejected")
KTO = "kto_tag"
SYSTEMS = ("system", "system_prompt", "system_message")
MORE = ("input", "context")
"""Columns with a further part of the question, such as its context; a column `prompt` is already complete."""
JOINED = (*MORE, "history", *SYSTEMS)
"""Columns that are joined with the question to the prompt."""

HUMAN = "\n\nHuman:"
_SPEAKERS = re.compile(r"\n\n(Human|Assistant):")

INSTRUCTED = "### Instruction:\n{asked}\n\n### Response:\n"
"""Text format of an instruction if there is no chat template: that of Stanford Alpaca."""


@dataclass(frozen=True)
class Convention:
    """A column convention of another tool: the columns that it may use, and the function that converts a row."""

    name: str
    uses: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]


def in_known_columns(
    rows: Rows, *, has_template: bool, prompts_only: bool = False, text_field: str | None = None
) -> Rows:
    """Convert the rows to columns that are used here; rows that have such columns are returned unchanged.

    With `prompts_only`, only prompts are converted, and columns with answers are kept.

    Raises DataError, with row and column, for a value that does not fit its column.
    """
    first = next(iter(rows), None)
    if first is None:
        return rows
    columns = rows.column_names or list(first)
    convention = recognise(first, columns, has_template=has_template, prompts_only=prompts_only, text_field=text_field)
    if convention is None:
        return rows
    uses = [name for name in convention.uses if name in columns]
    logger.info(f"The columns {uses} are read as {convention.name}.")

    def convert(row: Row, number: int) -> dict[str, Any]:
        try:
            return convention.convert(row)
        except DataError as error:
            raise RowError(number, f", {error}") from error

    shown = {"desc": "Reading columns"} if isinstance(rows, Dataset) else {}
    return rows.map(convert, with_indices=True, remove_columns=uses, **shown)


def recognise(
    first: Row,
    columns: Collection[str],
    *,
    has_template: bool,
    prompts_only: bool = False,
    text_field: str | None = None,
) -> Convention | None:
    """The convention of rows with these columns, judged by the first row; None if they need no conversion."""
    present = set(columns)
    chat = next((name for name in CHATS if name in present), None)
    asked = _question_in(present, prompts_only=prompts_only)
    answer = next((name for name in ANSWERED if name in present - {asked}), None)
    has_pair = present.issuperset(PAIR) and not prompts_only
    has_system = not present.isdisjoint(SYSTEMS)
    if "input_ids" in present or _is_text(present, text_field):
        return None
    if prompts_only:
        if asked is None or (asked == "prompt" and not has_system):
            return None
        return replace(_questions(asked, present, has_template, ()), uses=(asked,))
    if present.issuperset(("input", "preferred_output", "non_preferred_output")):
        return Convention("OpenAI's preferences", ("input", "preferred_output", "non_preferred_output"), _openai_pair)
    if has_pair and isinstance(first["chosen"], Mapping):
        source = chat or asked
        return None if source is None else _pairs_of_messages(source)
    if has_pair and asked is None and has_template and _is_hh(first["chosen"]) and _is_hh(first["rejected"]):
        return Convention(
            "dialogues of one text (HH)", PAIR, lambda row: extract_prompt({name: _turns(row, name) for name in PAIR})
        )
    if KTO in present and (chat or (asked and answer)):
        return _labelled(chat) if chat else _questions(asked, present, has_template, (answer, KTO))
    if has_pair and asked in (None, "prompt"):
        return _pairs_with_system(present) if has_system else None
    if has_pair:
        return _questions(asked, present, has_template, PAIR)
    if (asked, answer) == ("prompt", "completion"):
        return _questions(asked, present, has_template, (answer,)) if _columns_of_question(asked, present) else None
    if chat is not None:
        return _with_system(chat) if has_system or chat == "conversation" else None
    return None if asked is None or answer is None else _questions(asked, present, has_template, (answer,))


def _question_in(present: Collection[str], *, prompts_only: bool) -> str | None:
    """The column that holds the question. A complete row of our own columns keeps its `prompt`, made from another perhaps."""
    is_complete = prompts_only or "completion" in present or set(PAIR) <= set(present)
    order = ("prompt", *ASKED) if is_complete else ASKED
    return next((name for name in order if name in present), None)


def _is_text(present: Collection[str], text_field: str | None) -> bool:
    """True if rows are used as texts: they have the column `text_field`, or `text` and no columns of another kind."""
    others = {"prompt", "completion"} <= set(present) or not set(CHATS).isdisjoint(present)
    return text_field in present and (text_field != TEXT or not others)


# ---- questions and answers ----


def _questions(asked: str, present: Collection[str], has_template: bool, answers: tuple[str, ...]) -> Convention:
    """The convention of questions with one or two answers, or with an answer and its label (`kto_tag`)."""
    beside = _columns_of_question(asked, present)
    is_chat = has_template and asked != "prompt"
    names = dict(zip(answers, ("completion", "label") if answers[1:] != PAIR[1:] else PAIR, strict=False))

    def convert(row: Row) -> dict[str, Any]:
        if _conversation(row[asked]) is not None:
            made: dict[str, Any] = {"prompt": _with_system_prompt(row, row[asked])}
        else:
            made = {"prompt": _prompt(row, asked, beside, is_chat=is_chat)}
        for column, name in names.items():
            value = row[column]
            if name == "label" or isinstance(value, list):
                made[name] = _label(value) if name == "label" else value
            else:
                text = _text(row, column)
                made[name] = [{"role": "assistant", "content": text}] if is_chat else text
        return made

    shown = "" if asked == "prompt" else " (conversations)" if is_chat else " (texts)"
    made = ", ".join(["prompt", *names.values()])
    return Convention(f"{made}{shown}", (asked, *beside, *answers), convert)


def _columns_of_question(asked: str, present: Collection[str]) -> tuple[str, ...]:
    """The columns that are joined with the question to the prompt."""
    whole = MORE if asked == "prompt" else (asked,)
    return tuple(name for name in JOINED if name in present and name not in whole)


def _prompt(row: Row, asked: str, beside: tuple[str, ...], *, is_chat: bool) -> Any:
    question = _text(row, asked)
    for name in MORE:
        if name in beside and (more := _text(row, name, optional=True)):
            question = f"{question}\n{more}" if question else more
    system = _system(row)
    past = _history(row.get("history")) if "history" in beside else []
    if is_chat:
        opening = [{"role": "system", "content": system}] if system else []
        said = [
            {"role": role, "content": text}
            for pair in past
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return [*opening, *said, {"role": "user", "content": question}]
    turns = [f"{_written(q, asked)}{a}\n\n" for q, a in past]
    return "".join([f"{system}\n\n" if system else "", *turns, _written(question, asked)])


def _written(question: str, asked: str) -> str:
    """A question as text that an answer can follow."""
    if asked == "instruction":
        return INSTRUCTED.format(asked=question)
    return question if asked == "prompt" or question.endswith(("\n", " ")) else f"{question}\n"


def _history(value: Any) -> list[tuple[str, str]]:
    pairs = value or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise DataError(f"column 'history': expected a list of [question, answer] pairs, found {str(value)[:60]!r}.")
    return [tuple(pair) for pair in pairs]


def _text(row: Row, column: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r}: expected a string, found {describe(value)}.")
    return value


def _label(value: Any) -> bool:
    if value in (True, False):
        return bool(value)
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise DataError(f"column {KTO!r}: expected true (desirable) or false, found {str(value)[:60]!r}.")


# ---- conversations ----


def _pairs_of_messages(source: str) -> Convention:
    """The convention of a conversation (or question) in column `source`, with two final messages, chosen and rejected."""

    def convert(row: Row) -> dict[str, Any]:
        before = _conversation(row[source]) or [{"role": "user", "content": _text(row, source)}]
        return {"prompt": _with_system_prompt(row, before), **{name: tidy_messages([row[name]]) for name in PAIR}}

    return Convention("preferences between messages (LLaMA-Factory, axolotl)", (source, *PAIR, *SYSTEMS), convert)


def _pairs_with_system(present: Collection[str]) -> Convention:
    """The convention of pairs with a system prompt; their prompt is a column, or the common beginning of both sides."""
    made = tuple(name for name in ("prompt", *PAIR) if name in present)

    def convert(row: Row) -> dict[str, Any]:
        given = {name: row[name] if (chat := _conversation(row[name])) is None else chat for name in made}
        if not isinstance(given["chosen"], list):
            opened = ("prompt",) if "prompt" in given else PAIR
            return given | {name: _with_system_prompt(row, given[name]) for name in opened}
        pair = maybe_extract_prompt(given | {name: tidy_messages(given[name]) for name in PAIR})
        return {**pair, "prompt": _with_system_prompt(row, pair["prompt"])}

    return Convention("pairs with their system prompt", (*made, *SYSTEMS), convert)


def _labelled(chat: str) -> Convention:
    def convert(row: Row) -> dict[str, Any]:
        messages = _conversation(_with_system_prompt(row, row[chat]))
        return {"prompt": messages[:-1], "completion": messages[-1:], "label": _label(row[KTO])}

    return Convention("conversations with a label", (chat, KTO, *SYSTEMS), convert)


def _with_system(chat: str) -> Convention:
    def convert(row: Row) -> dict[str, Any]:
        return {"messages": _with_system_prompt(row, row[chat])}

    return Convention("conversations with their system prompt", (chat, *SYSTEMS), convert)


def _system(row: Row) -> str:
    return next(filter(None, (_text(row, name, optional=True) for name in SYSTEMS)), "")


def _conversation(value: Any) -> list[Any] | None:
    """The messages of a value that is a conversation, also if it is JSON text; None for any other value."""
    return conversation_in(value) if isinstance(value, str) else value if isinstance(value, list) else None


def _with_system_prompt(row: Row, value: Any) -> Any:
    """A conversation or text with the row's system prompt put before it, unless it begins with one already.

    A conversation that was JSON text is returned as JSON text, which tables use for values whose type differs between rows.
    """
    system, messages = _system(row), _conversation(value)
    if messages is None:
        if not isinstance(value, str):
            raise DataError(f"expected a list of messages, found {describe(value)}.")
        return f"{system}\n\n{value}" if system else value
    tidy = tidy_messages(messages)
    begins = bool(tidy) and isinstance(tidy[0], Mapping) and tidy[0].get("role") == "system"
    opened = [{"role": "system", "content": system}, *tidy] if system and not begins else tidy
    return json.dumps(opened, ensure_ascii=False) if isinstance(value, str) else opened


def _openai_pair(row: Row) -> dict[str, Any]:
    given = row["input"]
    if not isinstance(given, Mapping) or not isinstance(given.get("messages"), list):
        raise DataError(f"column 'input': expected {{\"messages\": […]}}, found {str(given)[:60]!r}.")
    made = {"prompt": tidy_messages(given["messages"])}
    made |= {"chosen": tidy_messages(row["preferred_output"]), "rejected": tidy_messages(row["non_preferred_output"])}
    return made | ({"tools": given["tools"]} if given.get("tools") else {})


def _is_hh(text: Any) -> bool:
    return isinstance(text, str) and text.startswith(HUMAN) and "\n\nAssistant:" in text


def _turns(row: Row, column: str) -> list[dict[str, str]]:
    """The messages of a text whose turns begin with "Human:" or "Assistant:"."""
    text = _text(row, column)
    before, *pieces = _SPEAKERS.split(text)
    if before.strip() or not pieces:
        raise DataError(f"column {column!r}: a dialogue begins with 'Human:', found {text[:60]!r}.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
