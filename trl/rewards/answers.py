"""Extract answers from texts, and compare them with a solution.

The answer is the content of the last \\boxed{…}; without one, only the text after the last #### (if any) counts: if that is a
single line without words, the answer is that line, else its last number. With math-verify installed (the extra "math"), answers
are extracted and compared as mathematics: (x − 1)(x + 1) = x² − 1. Without it they are compared as numbers if both are numbers
(0.5 = 1/2), else as text without spaces and dollar signs.
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
"""Time limit of math-verify for parsing or comparing one answer."""
LONGEST_FORMULA, LONGEST_TEXT = 200, 2000
"""Most characters of a line that counts as a formula, and of the end of any other text that is searched for an answer."""

Completion = str | Sequence[dict[str, Any]]

# A minus after a digit or a bracket is a difference or a range, and not a sign.
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
    """The content of the last \\boxed{…} of a text; None if there is none, or it is not closed."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += ((text[i] == "{") - (text[i] == "}")) * (text[i - 1] != "\\")
        if not depth:
            return text[start + len("\\boxed{") : i]
    return None


def extract_answer(text: str) -> str | None:
    """The last boxed expression of a text; else the formula, or the last number, after the last ####; None if there is none."""
    if (found := boxed(text)) is not None:
        return found
    text = text.rpartition("####")[2].strip()
    if is_formula(text):
        return text
    numbers = NUMBER.findall(text[-LONGEST_TEXT:])
    return numbers[-1] if numbers else None


def is_formula(text: str) -> bool:
    """True if a text is one line of mathematics, without words and without an equals sign (which joins steps)."""
    return 0 < len(text) <= LONGEST_FORMULA and "\n" not in text and "=" not in text and not WORD.search(text)


def is_prose(text: str) -> bool:
    """True if a text has several words and is no formula; a single word may be an answer."""
    return len(text.split()) > 1 and not is_formula(text.strip())


def as_number(answer: str) -> Fraction | None:
    """An answer as a number; None if it is not one."""
    plain = FRACTION.sub(r"\1/\2", answer).translate(str.maketrans("−–", "--", " $")).removesuffix(".")
    if not NUMBER.fullmatch(plain):
        return None
    top, _, bottom = plain.replace(",", "").partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def agree(answer: str, solution: str) -> bool:
    """True if two answers are the same number, or the same text without spaces and dollar signs."""
    first, second = as_number(answer), as_number(solution)
    if first is not None and second is not None:
        return first == second
    plain = [each.translate(str.maketrans("", "", " $\n")) for each in (answer, solution)]
    return plain[0] == plain[1]


def is_correct(text: str, solution: str) -> bool | None:
    """True if the answer in a text equals that in the solution; None if no answer can be extracted from the solution."""
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
    """True if math-verify is installed; if it is not, logs once how answers are compared instead."""
    found = is_available("math_verify")
    if not found:
        logger.warning(
            "math-verify is not installed, so answers are compared as numbers, or else as text. To compare them as mathematics: "
            'pip install "trl[math]".'
        )
    return found


def is_verified(text: str, solution: str) -> bool | None:
    """True if math-verify finds the two answers equal; None if it finds no answer in the solution."""
    math_verify = require("math_verify", to="comparing answers as mathematics")
    # Its time limits use signals, which only the main thread may set.
    seconds = VERIFY_SECONDS if threading.current_thread() is threading.main_thread() else None
    parse = functools.partial(math_verify.parse, parsing_timeout=seconds)
    gold = parse(marked(solution)) or ([] if is_prose(solution) else parse(f"${solution}$"))
    return bool(math_verify.verify(gold, parse(marked(text)), timeout_seconds=seconds)) if gold else None


def marked(text: str) -> str:
    """The part of a text that holds the answer: its last box, its formula between dollar signs, or its end.

    math-verify extracts only numbers from plain text, so that dollar signs are put around a bare formula.
    """
    if (found := boxed(text)) is not None:
        return f"\\boxed{{{found}}}" if len(found) <= LONGEST_TEXT else ""
    answer = text.rpartition("####")[2].strip()[-LONGEST_TEXT:]
    return f"${answer}$" if is_formula(answer) and not any(mark in answer for mark in MARKS) else answer


def accuracy_reward(completions: Sequence[Completion], solution: Sequence[str], **_: Any) -> list[float | None]:
    """1 if the answer of a completion equals that in the column `solution`, else 0; None if `solution` has no answer."""
    found = [is_correct(text_of(c), s) for c, s in zip(completions, solution, strict=True)]
    return [None if each is None else float(each) for each in found]


accuracy_reward.imports = ("math_verify",)


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] = ("</think>",),
    **_: Any,
) -> list[float | None]:
    """`accuracy_reward` of the text after the reasoning; 0 if the reasoning is not closed."""
    answers = []
    for text in map(text_of, completions):
        ends = [text.rfind(d) + len(d) for d in reasoning_delimiters if d in text]
        answers.append(text[max(ends) :] if ends else "")
    return accuracy_reward(answers, solution)


reasoning_accuracy_reward.imports = accuracy_reward.imports


class get_cosine_scaled_reward:
    """Accuracy scaled by length: a short correct answer gets the highest reward, a short wrong one the lowest.

    r = v + ½ (w − v) (1 + cos(π · length / max_len)), which is w at length 0 and v at `max_len`. Correct answers go from
    `max_value_correct` down to `min_value_correct`, wrong ones from `min_value_wrong` up to `max_value_wrong`
    (arXiv:2502.03373, appendix C.1). Lengths are in tokens, limited to `max_len`.
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
