"""One encoding function per row kind: from columns to trees of token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trl.data.columns import Columns, describe
from trl.data.formats import TEXT, chosen_fields, maybe_extract_prompt
from trl.data.messages import is_trained
from trl.data.multimodal import expanded, expanded_spans
from trl.data.pretokenised import tokenized, tokenized_preference
from trl.data.settings import EncodeSettings
from trl.data.tokenization import Tokenization
from trl.data.tokens import Span
from trl.data.trees import Tree, fork
from trl.errors import DataError

logger = logging.getLogger(__name__)


def language_modeling(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """A text or a conversation: one completion on an empty prompt."""
    name = next(
        n for n in (*chosen_fields(tokenization.settings.text_field), "messages", "conversations", TEXT) if n in columns
    )
    if tokenization.settings.completion_only_loss and tokenization.settings.token_mask is None:
        raise DataError(
            f"completion_only_loss=True needs columns 'prompt' and 'completion', but {name!r} holds both in one. "
            "Split it, or train on a conversation's answers with assistant_only_loss=True."
        )
    if not columns.is_chat(name):
        _refuse_assistant_only(tokenization.settings, name)
        texts = expanded(columns, tokenization.images, columns.texts(name))
        encode = tokenization.text.prompts if tokenization.settings.add_eos else tokenization.text.ids
        ids = encode(texts, add_special_tokens=tokenization.settings.add_special_tokens)
        return [Tree([], [row]) for row in tokenization.append_eos(ids)]
    if tokenization.settings.assistant_only_loss:
        return _assistant_only(columns, columns.spoken_chats(name), tokenization)
    chats = columns.chats(name)
    texts = columns.each(lambda k, row: tokenization.chat.whole(chats[k], row))
    return [Tree([], [row]) for row in tokenization.text.ids(expanded(columns, tokenization.images, texts))]


def _refuse_assistant_only(settings: EncodeSettings, name: str) -> None:
    if settings.assistant_only_loss:
        raise DataError(f"assistant_only_loss=True needs conversations, but column {name!r} holds text.")


def _assistant_only(columns: Columns, chats: Sequence[list[dict[str, Any]]], tokenization: Tokenization) -> list[Tree]:
    """Whole conversations of which only the assistant's turns are trained on."""
    spanned = columns.each(lambda k, row: tokenization.chat.assistant_spans(chats[k], row))
    texts, spans = expanded_spans(columns, tokenization.images, *zip(*spanned, strict=True))
    ids, masks = tokenization.text.masked(texts, spans)
    return [Tree([], [row], [mask]) for row, mask in zip(ids, masks, strict=True)]


def prompt_only(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """A prompt without completions."""
    if columns.is_chat("prompt"):
        chats = columns.chats("prompt")
        texts, encode = columns.each(lambda k, row: tokenization.chat.prompt(chats[k], row)), tokenization.text.ids
    else:
        texts, encode = columns.texts("prompt"), tokenization.prompts
    return [Tree(ids, []) for ids in encode(expanded(columns, tokenization.images, texts))]


def prompt_completion(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """A prompt and one completion; with completion_only_loss=False the prompt is trained on as well."""
    if tokenization.settings.assistant_only_loss:
        return _spoken_completions(columns, tokenization)
    trees = _answers(columns, tokenization, ("completion",))
    if tokenization.settings.completion_only_loss is False and not tokenization.settings.encoder_decoder:
        return [Tree([], [tree.prompt + tree.completions[0]]) for tree in trees]
    return trees


def _spoken_completions(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """Prompts and completions of which only the assistant's turns are trained on, not those of tools or users."""
    if not columns.is_chat("prompt"):
        _refuse_assistant_only(tokenization.settings, "prompt")
    prompts = columns.chats("prompt")
    answers = without_prompts(prompts, columns.chats("completion", answers=True))
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    if tokenization.settings.completion_only_loss is False:
        return _assistant_only(columns, whole, tokenization)

    def spoken(k: int, row: dict[str, Any]) -> tuple[str, str, list[Span]]:
        prompt, (answer,) = tokenization.chat.answers(prompts[k], [answers[k]], row)
        spans = tokenization.chat.assistant_spans(whole[k], row)[1]
        start = len(prompt)
        return prompt, answer, [(max(s, start) - start, e - start) for s, e in spans if e > start]

    prompt_texts, texts, spans = zip(*columns.each(spoken), strict=True)
    prompt_texts = expanded(columns, tokenization.images, prompt_texts)
    rows = zip(tokenization.text.ids(prompt_texts), *tokenization.text.masked(texts, spans), strict=True)
    return [Tree(prompt, [ids], [mask]) for prompt, ids, mask in rows]


def dialogue(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """Alternating prompts and outputs, as texts; outputs are trained on, and with completion_only_loss=False everything.

    An empty first prompt is replaced by the token that begins a text. With an encoder-decoder there is one prompt and one
    output.
    """
    for k, turns in enumerate(columns["dialogue"]):
        _check_turns(columns, k, turns, single=tokenization.settings.encoder_decoder)
    rows = columns["dialogue"]
    firsts = [ids or [tokenization.start] for ids in tokenization.prompts([turns[0] for turns in rows])]
    pieces = iter(tokenization.following(rows))
    others = [[next(pieces) for _ in turns[1:]] for turns in rows]
    ended = [[*turns[:-1], *tokenization.append_eos(turns[-1:])] for turns in others]
    trees = [_turns(first, turns) for first, turns in zip(firsts, ended, strict=True)]
    if tokenization.settings.completion_only_loss is False and not tokenization.settings.encoder_decoder:
        return [Tree([], [whole := tree.prompt + tree.completions[0]], [[True] * len(whole)]) for tree in trees]
    return trees


def _turns(prompt: list[int], others: list[list[int]]) -> Tree:
    """A tree whose completion holds all outputs and later prompts, of which the outputs are trained on."""
    mask = [i % 2 == 0 for i, turn in enumerate(others) for _ in turn]
    return Tree(prompt, [[token for turn in others for token in turn]], [mask])


def _check_turns(columns: Columns, k: int, turns: Any, *, single: bool) -> None:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise columns.error(k, "dialogue", f"expected a list of texts, found {describe(turns)}.")
    if len(turns) % 2:
        raise columns.error(
            k,
            "dialogue",
            f"{len(turns)} turns: prompts and outputs alternate, so that their number has to be even. Found {describe(turns)}.",
        )
    if single and len(turns) != 2:
        raise columns.error(k, "dialogue", f"{len(turns)} turns: an encoder-decoder takes one prompt and one output.")


def unpaired_preference(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """A prompt and one completion, with a label that says whether it is desirable."""
    for k, label in enumerate(columns["label"]):
        if label not in (True, False):
            raise columns.error(k, "label", f"expected true (desirable) or false, found {describe(label)}.")
    return _answers(columns, tokenization, ("completion",))


def preference(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """A prompt with the chosen and the rejected completion.

    If a pair has no prompt, or consists of conversations without a common message, both sides are tokenised whole, and the
    tokens that they begin with in common are the prompt.
    """
    if "prompt" not in columns and not columns.is_chat("chosen"):
        texts = [expanded(columns, tokenization.images, columns.texts(name)) for name in ("chosen", "rejected")]
        sides = [tokenization.text.prompts(side, add_special_tokens=True) for side in texts]
        return [fork(*pair) for pair in zip(*map(tokenization.append_eos, sides), strict=True)]
    columns = _with_prompt(columns)
    places = range(len(columns.rows))
    apart = [k for k in places if columns["prompt"][k] == []]
    if apart and tokenization.settings.needs_prompt:
        raise columns.error(
            apart[0],
            "chosen",
            (
                "there is no prompt: it has no message in common with 'rejected'. Give every row a prompt, or remove such rows."
            ),
        )
    shared = [k for k in places if k not in set(apart)]
    trees = _answers(columns.at(shared), tokenization, ("chosen", "rejected")) if shared else []
    found = dict(zip([*shared, *apart], [*trees, *_apart(columns.at(apart), tokenization)], strict=True))
    return [found[k] for k in places]


def _apart(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """Trees of pairs of conversations that have no message in common."""
    if not columns.rows:
        return []
    sides = []
    for chats in map(columns.chats, ("chosen", "rejected")):
        texts = columns.each(lambda k, row, chats=chats: tokenization.chat.whole(chats[k], row))
        sides.append(tokenization.text.ids(expanded(columns, tokenization.images, texts)))
    return [fork(*pair) for pair in zip(*sides, strict=True)]


def _with_prompt(columns: Columns) -> Columns:
    if not columns.is_chat("chosen") or ("prompt" in columns and columns.is_chat("prompt")):
        return columns
    tidy = replace(columns, values={**columns.values, **{n: columns.chats(n) for n in ("chosen", "rejected")}})
    rows = [maybe_extract_prompt(row) for row in tidy]
    return replace(columns, values={name: [row[name] for row in rows] for name in rows[0]})


def _answers(columns: Columns, tokenization: Tokenization, names: tuple[str, ...]) -> list[Tree]:
    """Trees of the prompt and the completions in the columns `names`."""
    if columns.is_chat("prompt"):
        return _chat_answers(columns, tokenization, names)
    prompts, texts = columns.texts("prompt"), [columns.texts(name) for name in names]
    if not columns.rows[0]:
        say_repeated(columns, prompts, texts)
    prompts = expanded(columns, tokenization.images, prompts)
    prompt_ids, answer_ids = tokenization.continuations(prompts, texts, add_special_tokens=True)
    answers = zip(*map(tokenization.append_eos, answer_ids), strict=True)
    return [Tree(prompt, list(ids)) for prompt, ids in zip(prompt_ids, answers, strict=True)]


def _chat_answers(columns: Columns, tokenization: Tokenization, names: tuple[str, ...]) -> list[Tree]:
    prompts = columns.chats("prompt")
    answers = [without_prompts(prompts, columns.chats(name, answers=True)) for name in names]
    check_learned(columns, dict(zip(names, answers, strict=True)))
    rendered = columns.each(lambda k, row: tokenization.chat.answers(prompts[k], [chats[k] for chats in answers], row))
    prompt_texts, texts = [prompt for prompt, _ in rendered], list(zip(*(texts for _, texts in rendered), strict=True))
    prompt_texts = expanded(columns, tokenization.images, prompt_texts)
    prompt_ids, answer_ids = tokenization.continuations(prompt_texts, texts, add_special_tokens=False)
    rows = zip(prompt_ids, zip(*answer_ids, strict=True), strict=True)
    return [Tree(prompt, list(ids)) for prompt, ids in rows]


def without_prompts(prompts: Sequence[list[Any]], answers: Sequence[list[Any]]) -> list[list[Any]]:
    """The answers without their prompt, if they are whole conversations that repeat it."""
    return [
        answer[len(prompt) :] if len(answer) > len(prompt) and answer[: len(prompt)] == prompt else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def say_repeated(columns: Columns, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
    """Warn if the answers of all rows begin with their prompt, which would then be in the text twice."""
    if all(
        len(p) > 1 and all(text.startswith(p) for text in texts) for p, *texts in zip(prompts, *answers, strict=True)
    ):
        logger.warning(
            f"In row {columns.rows[0] + 1} and the following rows, the answers repeat the prompt: remove the column 'prompt', or "
            "remove the prompt from the answers."
        )


def check_learned(columns: Columns, answers: Mapping[str, Sequence[list[dict[str, Any]]]]) -> None:
    """Raise RowError for a message that is excluded from training by its weight, where answers are trained on as a whole."""
    for name, chats in answers.items():
        for k, chat in enumerate(chats):
            left_out = next((i for i, message in enumerate(chat) if not is_trained(message)), None)
            if left_out is not None:
                remedy = "set assistant_only_loss=True, or " if name == "completion" and "label" not in columns else ""
                raise columns.error(
                    k,
                    name,
                    f"message {left_out + 1} is excluded from training by its weight, but answers are trained on as a whole: "
                    f"{remedy}remove the key or the row.",
                )


def stepwise(columns: Columns, tokenization: Tokenization) -> list[Tree]:
    """A prompt and one completion of several steps, each followed by the separator.

    The mask marks the last token of each step; the signal `step_label` has the label of the step there, and 0 elsewhere.
    """
    prompts = tokenization.prompts(columns.texts("prompt"))
    separator = tokenization.text.ids([tokenization.settings.step_separator])[0]
    for k, (steps, labels) in enumerate(zip(columns["completions"], columns["labels"], strict=True)):
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise columns.error(k, "completions", f"expected a list of strings, found {describe(steps)}.")
        if not isinstance(labels, list) or len(labels) != len(steps):
            raise columns.error(k, "labels", f"expected {len(steps)} labels, one per step, found {describe(labels)}.")
    flat = iter(tokenization.text.ids([step for steps in columns["completions"] for step in steps]))
    steps_of = [[next(flat) + separator for _ in steps] for steps in columns["completions"]]
    return [_steps(*row) for row in zip(prompts, steps_of, columns["labels"], strict=True)]


def _steps(prompt: list[int], steps: list[list[int]], labels: Sequence[float]) -> Tree:
    ids = [token for step in steps for token in step]
    mask = [t == len(step) - 1 for step in steps for t in range(len(step))]
    values = iter(labels)
    return Tree(prompt, [ids], [mask], {"step_label": [[float(next(values)) if end else 0.0 for end in mask]]})


_KINDS = (language_modeling, prompt_only, prompt_completion, unpaired_preference, preference, dialogue, stepwise)
ENCODERS: dict[str, Callable[[Columns, Tokenization], list[Tree]]] = {
    kind.__name__: kind for kind in (*_KINDS, tokenized, tokenized_preference)
}
