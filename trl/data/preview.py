"""Show rows as the model is trained on them: trained tokens coloured, ignored ones dim, special tokens and line ends visible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from trl.counts import counted
from trl.printable import printable
from trl.types import Completion, Example

TRAINED, IGNORED, SPECIAL = "green", "bright_black", "bold reverse"
OPEN, CLOSE = "⟦", "⟧"
"""Brackets around trained text on consoles without colours."""

Run = tuple[str, bool, bool]
"""(text, is trained, is special)"""


def preview_examples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    console: Console | None = None,
    image_token: int | None = None,
    packed: Sequence[int] = (),
    sides: Sequence[str] = (),
) -> None:
    """Print examples with the trained text highlighted, by colour or, on consoles without colours, by ⟦brackets⟧.

    The tokens of an image (`image_token`) are shown as their number. If rows were packed, `packed` has the number of examples
    in each packed row. `sides` are names of an example's completions, such as "chosen" and "rejected".
    """
    console = console or Console()
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    console.print(_legend(coloured))
    places = [f"packed row {row}, document {i + 1}" for row, size in enumerate(packed, start=1) for i in range(size)]
    for number, example in enumerate(examples):
        place = places[number] if packed else f"row {number + 1}"
        console.print(Rule(Text(f"{place}: {_count(example)}"), style="dim", align="left"))
        for block in _blocks(example, tokenizer, image_token, coloured, sides):
            console.print(block)
    console.print(Rule(style="dim"))


def _count(example: Example) -> str:
    """`59 tokens, 58 trained`, or only the number of tokens for a prompt whose completions are still to be sampled."""
    has_completions = any(len(completion) for completion in example.completions)
    trained = f", {_trained(example):,} trained" if has_completions else ""
    return f"{counted(example.tokens, 'token')}{trained}"


def as_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The example's `prompt` and `completions`, special tokens included."""
    return {
        "prompt": tokenizer.decode(list(example.prompt)),
        "completions": [tokenizer.decode(list(completion.ids)) for completion in example.completions],
    }


def _legend(coloured: bool) -> Text:
    if not coloured:
        return Text(f"{OPEN}trained{CLOSE} ignored  ↵ line end")
    parts = [("trained", TRAINED), "  ", ("ignored", IGNORED), "  ", (" special ", SPECIAL), "  ↵ line end"]
    return Text.assemble(*parts)


def _trained(example: Example) -> int:
    """Number of trained tokens; without a prompt the first token does not count, since nothing predicts it."""
    unpredicted = int(not example.prompt)
    return sum(sum(_mask(completion)[unpredicted:]) for completion in example.completions)


def _mask(completion: Completion) -> Sequence[bool]:
    return [True] * len(completion) if completion.mask is None else [bool(m) for m in completion.mask]


def _blocks(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    image_token: int | None,
    coloured: bool,
    sides: Sequence[str],
) -> Iterator[Text]:
    """The texts of an example: a single completion continues the line of its prompt, several are listed below it."""
    prompt = list(example.prompt)
    ignored = [False] * len(prompt)
    alone = len(example.completions) == 1
    if not alone:
        yield _text(_runs(prompt, ignored, tokenizer, image_token), coloured)
    for number, completion in enumerate(example.completions, start=1):
        ids, mask = list(completion.ids), _mask(completion)
        if alone:
            ids, mask = [*prompt, *ids], [*ignored, *mask]
        else:
            name = sides[number - 1] if sides else f"completion {number} of {len(example.completions)}"
            yield Text(f"{name}: {counted(len(completion), 'token')}", style="bold")
        mask = mask if prompt and not alone else [False, *mask[1:]]  # nothing predicts the first token
        yield _text(_runs(ids, mask, tokenizer, image_token), coloured)
        if completion.signals:
            shown = (f"{name}={_number(value)}" for name, value in completion.signals.items())
            yield Text("  ".join(shown), style="italic")


def _number(value: float | Sequence[float]) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else f"[{', '.join(f'{v:.4g}' for v in value)}]"


def _runs(ids: list[int], mask: Sequence[bool], tokenizer: PreTrainedTokenizerBase, image: int | None) -> Iterator[Run]:
    """Runs of neighbouring tokens of the same kind, as text.

    Each run is decoded together with all tokens before it, since spaces between tokens depend on those.
    """
    special = set(tokenizer.all_special_ids)
    kinds = [(trained, token in special, token == image) for token, trained in zip(ids, mask, strict=True)]
    seen, end = 0, 0
    for (trained, is_special, is_image), run in groupby(kinds):
        count = len(list(run))
        end += count
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield f"[{count:,} image tokens]" if is_image else text[seen:], trained, is_special
        seen = len(text)


def _text(runs: Iterable[Run], coloured: bool) -> Text:
    text = Text()
    for trained, group in groupby(runs, key=lambda run: run[1]):
        text.append(OPEN if trained and not coloured else "")
        for content, _, special in group:
            style = f"{TRAINED if trained else IGNORED}{f' {SPECIAL}' if special else ''}"
            text.append(printable(content).replace("\n", "↵\n"), style=style)
        if trained and not coloured:
            text = _closed(text)
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


def _closed(text: Text) -> Text:
    """The text with the closing bracket at the end of its last line, before a line end."""
    ends_line = text.plain.endswith("\n")
    if ends_line:
        text.right_crop(1)
    return text.append(f"{CLOSE}\n" if ends_line else CLOSE)
