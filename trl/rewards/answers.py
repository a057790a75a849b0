"""Answers in texts, and whether they agree with a solution.

The answer is what stands in the last \\boxed{…}, else after the last ####; of a line that has no words it is the line, of
any other text the last number. With math-verify installed (the extra "math"), answers are found and compared as mathematics:
(x − 1)(x + 1) = x² − 1. Without it they are compared as numbers where both are numbers (0.5 = 1/2), else as text without
spaces and dollars.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from trl.imports import is_available, require

logger = logging.getLogger(__name__)

VERIFY_SECONDS = 5
"""Time that math-verify may take to read or compare one answer."""
LONGEST_FORMULA, LONGEST_TEXT = 200, 2000
"""Characters of a line that is taken for a formula, and those at the end of any other text that are looked through."""

Completion = str | Sequence[dict[str, Any]]

# A minus after a digit or a bracket is a difference or a range.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−–])?"
    r"(?:\\[dt]?frac\{-?\d+\}\{\d+\}|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?:/\d+)?)"
)
FRACTION = re.compile(r"(?<!\d)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")
MARKS = ("$", "\\(", "\\[", "\\boxed")


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the last message of a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} of a text; None if there is none, or it is not closed."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += ((text[i] == "{") - (text[i] == "}")) * (text[i - 1] != "\\")
        if not depth:
            return text[start + len("\\boxed{") : i]
    return None


def extract_answer(text: str) -> str | None:
    """The last boxed expression of a text; else, after the last ####, the line if it has no words, or the last number."""
    if (found := boxed(text)) is not None:
        return found
    text = text.rpartition("####")[2].strip()
    if is_formula(text):
        return text
    numbers = NUMBER.findall(text[-LONGEST_TEXT:])
    return numbers[-1] if numbers else None


def is_formula(text: str) -> bool:
    """Whether a text is one line of mathematics, without words and without steps that lead to a result."""
    return 0 < len(text) <= LONGEST_FORMULA and "\n" not in text and "=" not in text and not WORD.search(text)


def is_prose(text: str) -> bool:
    """Whether a text is several words, in which no answer can be read; a single one may be the answer."""
    return len(text.split()) > 1 and not is_formula(text.strip())


def as_number(answer: str) -> Fraction | None:
    """An answer as a number, None if it is none."""
    plain = FRACTION.sub(r"\1/\2", answer).translate(str.maketrans("−–", "--", " $")).removesuffix(".")
    if not NUMBER.fullmatch(plain):
        return None
    top, _, bottom = plain.replace(",", "").partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def agree(answer: str, solution: str) -> bool:
    """Whether two answers are the same number, or the same text without spaces and dollars."""
    first, second = as_number(answer), as_number(solution)
    if first is not None and second is not None:
        return first == second
    plain = [each.translate(str.maketrans("", "", " $\n")) for each in (answer, solution)]
    return plain[0] == plain[1]


def is_correct(text: str, solution: str) -> bool | None:
    """Whether the answer in a text is that of the solution; None where no answer can be read in the solution."""
    if not solution.strip():
        return None
    if has_math_verify():
        return is_verified(text, solution)
    gold = extract_answer(solution) or ("" if is_prose(solution) else solution)
    if not gold:
        return None
    answer = extract_answer(text)
    return answer is not None and agree(answer, gold)


@functools.cache
def has_math_verify() -> bool:
    """Whether math-verify is installed; says once what happens if it is not."""
    found = is_available("math_verify")
    if not found:
        logger.warning(
            'Answers are compared as numbers, or else as text. To compare them as mathematics: pip install "trl[math]".'
        )
    return found


def is_verified(text: str, solution: str) -> bool | None:
    """Whether math-verify finds the answers equal; None where it finds no answer in the solution."""
    math_verify = require("math_verify", to="comparing answers as mathematics")
    # Its time limits are signals, which only the main thread may set.
    seconds = VERIFY_SECONDS if threading.current_thread() is threading.main_thread() else None
    parse = functools.partial(math_verify.parse, parsing_timeout=seconds)
    gold = parse(marked(solution)) or ([] if is_prose(solution) else parse(f"${solution}$"))
    return bool(math_verify.verify(gold, parse(marked(text)), timeout_seconds=seconds)) if gold else None


def marked(text: str) -> str:
    """The part of a text that holds the answer: its last box, a formula between dollars, or the end of it.

    math-verify takes only numbers from plain text, so a formula without marks is given them.
    """
    if (found := boxed(text)) is not None:
        return f"\\boxed{{{found}}}" if len(found) <= LONGEST_TEXT else ""
    answer = text.rpartition("####")[2].strip()[-LONGEST_TEXT:]
    return f"${answer}$" if is_formula(answer) and not any(mark in answer for mark in MARKS) else answer


def accuracy_reward(completions: Sequence[Completion], solution: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the answer of a completion is that of the column `solution`, else 0; None where that has none."""
    found = [is_correct(text_of(c), s) for c, s in zip(completions, solution, strict=True)]
    return [None if each is None else float(each) for each in found]


accuracy_reward.imports = ("math_verify",)


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] = ("</think>",),
    **_: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the reasoning; 0 where the reasoning is not closed."""
    answers = []
    for text in map(text_of, completions):
        ends = [text.rfind(d) + len(d) for d in reasoning_delimiters if d in text]
        answers.append(text[max(ends) :] if ends else "")
    return accuracy_reward(answers, solution)


reasoning_accuracy_reward.imports = accuracy_reward.imports


class get_cosine_scaled_reward:
    """Accuracy whose worth depends on length: right and short is best, wrong and short is worst.

    r = v + ½ (w − v) (1 + cos(π · length / max_len)), w at length 0 and v at `max_len`; right answers go from
    `max_value_correct` down to `min_value_correct`, wrong ones from `min_value_wrong` up to `max_value_wrong`
    (arXiv:2502.03373, appendix C.1). Lengths are in tokens, at most `max_len`.
    """

    __name__ = "cosine_scaled_reward"
    imports = accuracy_reward.imports

    def __init__(
        self,
        max_len: int,
        min_value_wrong: float = -1.0,
        max_value_wrong: float = -0.5,
        min_value_correct: float = 0.5,
        max_value_correct: float = 1.0,
    ) -> None:
        self.max_len = max_len
        self.bounds = {
            True: (max_value_correct, min_value_correct),
            False: (min_value_wrong, max_value_wrong),
        }

    def __call__(
        self,
        completions: Sequence[Completion],
        solution: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for right, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            start, end = self.bounds[bool(right)]
            share = min(len(ids) / self.max_len, 1.0)
            scaled = end + (start - end) * (1 + math.cos(math.pi * share)) / 2
            rewards.append(None if right is None else scaled)
        return rewards
