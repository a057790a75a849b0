"""The labelling tasks: questions about completions, and the dataset rows that answers become.

rate      a mark m from 1 (bad) to 5 (good)      prompt, completion, score      score = (m − 3) / 2
approve   good or bad                            prompt, completion, label
compare   the better of two                      prompt, chosen, rejected
correct   the completion as it should have been  prompt, chosen, rejected       chosen is the corrected one
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data.formats import PICTURES
from trl.errors import DataError, unknown

Content = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""

TASKS = ("rate", "approve", "compare", "correct")
MARKS = range(1, 6)
TIE = "tie"
LONGEST = 200_000
"""Maximum number of characters in a correction."""

ROWS: dict[str, tuple[str, ...]] = {
    "rate": ("score", "label", "pairs"),
    "approve": ("label",),
    "compare": ("pairs",),
    "correct": ("pairs", "completions"),
}
"""Row formats in which the answers of a task can be written; the first is the default."""

Answer = int | bool | str
"""A mark, good (True) or bad (False), the index of the better completion (0, 1 or "tie"), or a corrected text."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """An item to judge: a prompt with a completion, or with two completions to compare."""

    prompt: Content
    completions: tuple[Content, ...]

    @property
    def key(self) -> str:
        """A hash of the texts, independent of the order of two completions."""
        texts = [json.dumps(each, ensure_ascii=False, sort_keys=True) for each in (self.prompt, *self.completions)]
        return hashlib.sha256("\0".join([texts[0], *sorted(texts[1:])]).encode()).hexdigest()[:20]


def check_task(task: str) -> None:
    if task not in TASKS:
        raise DataError(unknown("task", task, TASKS))


def check_no_images(row: Mapping[str, Any], where: str) -> None:
    """Raises DataError for a row with images, because the page shows only texts."""
    in_parts = (
        part.get("type") in ("image", "image_url")
        for value in row.values()
        for message in (value if isinstance(value, list) else ())
        if isinstance(message, Mapping)
        for part in (message.get("content") if isinstance(message.get("content"), list) else ())
    )
    if any(in_parts) or any(row.get(name) for name in sorted(PICTURES)):
        raise DataError(f"{where} has images, but the page shows only texts. Use rows without images.")


def check_answer(task: str, item: Item, answer: Any, where: str = "") -> Answer:
    """Return the answer if it is valid for the task. Raises DataError, prefixed with `where`, if not."""
    if task == "rate" and type(answer) is int and answer in MARKS:
        return answer
    if task == "approve" and type(answer) is bool:
        return answer
    if task == "compare" and (answer == TIE or (type(answer) is int and answer in range(len(item.completions)))):
        return answer
    if task == "correct" and type(answer) is str and answer.strip() and len(answer) <= LONGEST:
        return answer
    raise DataError(f"{where}{answer!r:.60} is not an answer to the task {task!r}, which takes {_TAKES[task]}.")


_TAKES = {
    "rate": "a mark from 1 to 5",
    "approve": "true or false",
    "compare": f'0 or 1, the index of the better completion, or "{TIE}"',
    "correct": f"a text of 1 to {LONGEST:,} characters",
}


def score_of(mark: int) -> float:
    """The score (m − 3) / 2 of a mark m; a mark of 3 is neutral."""
    return (mark - 3) / 2


def mark_of(score: float) -> int:
    """The mark whose score is nearest."""
    return min(MARKS, key=lambda mark: abs(score_of(mark) - score))


def to_rows(task: str, item: Item, answer: Answer, form: str) -> list[Row]:
    """The rows that one answer becomes; none if the format cannot express it (a tie, or a mark of 3 as a label).

    `form` is one of `ROWS[task]`, except "pairs" for the task "rate", which needs several answers: see `pairs_of`.
    """
    if task == "compare":
        return [] if answer == TIE else [_pair(item.prompt, item.completions[answer], item.completions[1 - answer])]
    (completion,) = item.completions
    if task == "rate" and form == "score":
        return [{"prompt": item.prompt, "completion": completion, "score": score_of(answer)}]
    if form == "label":
        good = answer if task == "approve" else score_of(answer)
        return [] if good == 0 and task == "rate" else [_labelled(item.prompt, completion, good > 0)]
    corrected = as_content(answer, completion)
    if form == "completions":
        return [{"prompt": item.prompt, "completion": corrected}]
    return [] if corrected == completion else [_pair(item.prompt, corrected, completion)]


def _pair(prompt: Content, chosen: Content, rejected: Content) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _labelled(prompt: Content, completion: Content, label: bool) -> Row:
    return {"prompt": prompt, "completion": completion, "label": label}


def as_content(text: str, like: Content) -> Content:
    """The corrected text in the format of the completion: a text, or a list with one assistant message."""
    return text if isinstance(like, str) else [{**like[-1], "content": text}]


def pairs_of(rated: Sequence[tuple[Item, int]]) -> Iterator[Row]:
    """Pairs of completions of the same prompt that one rater gave different marks."""
    for i, (first, mark) in enumerate(rated):
        for second, other in rated[i + 1 :]:
            if first.prompt == second.prompt and mark != other:
                better, worse = (first, second) if mark > other else (second, first)
                yield _pair(first.prompt, better.completions[0], worse.completions[0])


def text_of(content: Content) -> str:
    """A text as it is, or the content of a conversation's last message."""
    return content if isinstance(content, str) else str(content[-1]["content"])


def answer_in(task: str, line: str) -> tuple[Item, Answer] | None:
    """The item and answer of a dataset line in the task's default format; None for any other line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    match task, row:
        case "rate", {"prompt": prompt, "completion": completion, "score": int() | float() as score}:
            return Item(prompt, (completion,)), mark_of(score)
        case "approve", {"prompt": prompt, "completion": completion, "label": bool() as label}:
            return Item(prompt, (completion,)), label
        case "compare", {"prompt": prompt, "chosen": chosen, "rejected": rejected}:
            return Item(prompt, (chosen, rejected)), 0
        case "correct", {"prompt": prompt, "chosen": chosen, "rejected": rejected}:
            return Item(prompt, (rejected,)), text_of(chosen)
    return None


def pairs_in_rings(count: int, most: int | None = None) -> list[tuple[int, int]]:
    """At most `most` pairs of `count` members on a circle: neighbours first, then those at distance 2, ….

    For each distance, every member is first in one pair and second in another, so that no position is favoured.
    """
    pairs = [
        (i, (i + distance) % count)
        for distance in range(1, count // 2 + 1)
        for i in range(count // 2 if 2 * distance == count else count)
    ]
    return pairs[:most]
