"""Answers in texts, and whether they agree with a solution.

The answer is what stands in the last \\boxed{…}, else after the last ####; a text that is a formula is its own answer, and of
any other it is the last number. With math-verify installed (the extra "math"), answers are found and compared as mathematics:
(x − 1)(x + 1) = x² − 1. Without it they are compared as numbers where both are numbers (0.5 = \\frac{1}{2}), else as text. A
unit has to be right where both have one.
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

Completion = str | Sequence[dict[str, Any]]

NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−–])?"  # a minus after a digit or a bracket is a difference or a range
    r"(?:(?:\d+\s*)?\\[dt]?frac\{-?\d+\}\{\d+\}"
    r"|(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?(?:\s*/\s*\d+)?|\.\d+)"
)
MIXED = re.compile(r"(\d+)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
ATOM = re.compile(r"\s*-?\\?\w+\s*")
UNIT = re.compile(r"(?:\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?-?\d\}?)?|\^\{?\\circ\}?|°)[\s$]*$")
VARIABLE = re.compile(r"^[\s$]*[a-zA-Z]\s*=(?!=)")
WORD = re.compile(r"(?:^|\s)[^\W\d_]{2,}(?=[\s.,:;!?]|$)")
IGNORED = re.compile(r"\\(?:text|mathrm|mbox|left|right|[,;! ()\[\]])|[\s${}]|\\[%$]|%")


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
    """The last boxed expression of a text, or what follows the last ####; else the text if it is a formula; else its last
    number, or None."""
    if (found := boxed(text)) is not None:
        return found
    text = VARIABLE.sub("", text.rpartition("####")[2], count=1).strip()
    if is_formula(text):
        return text
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def is_formula(text: str) -> bool:
    """Whether a text is one line of mathematics, without words and without steps that lead to a result."""
    return bool(text) and "\n" not in text and "=" not in text and not WORD.search(UNIT.sub("", text))


def normalised(answer: str) -> str:
    """An answer without what makes no difference: spaces, dollars, braces, \\text, thousands separators, a leading `x =`."""
    plain = VARIABLE.sub("", answer, count=1).replace("−", "-").replace("–", "-")
    plain = MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", plain)
    plain = IGNORED.sub("", FRACTION.sub(_quotient, plain)).rstrip(".").removeprefix("+")
    return plain.replace(",", "") if NUMBER.fullmatch(plain) else plain


def _quotient(fraction: re.Match) -> str:
    parts = (fraction[1] or fraction[2], fraction[3] or fraction[4])
    return "/".join(part if ATOM.fullmatch(part) else f"({part})" for part in parts)


def as_number(answer: str) -> Fraction | None:
    """An answer as a number, None if it is none."""
    plain = normalised(answer)
    if not NUMBER.fullmatch(plain):
        return None
    top, _, bottom = plain.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def agree(answer: str, solution: str) -> bool:
    """Whether two answers are the same number, of the same unit where both have one, or the same text."""
    numbers = [as_number(UNIT.sub("", each)) for each in (answer, solution)]
    if None in numbers:
        return normalised(answer) == normalised(solution)
    units = {normalised(found[0]) for each in (answer, solution) if (found := UNIT.search(each))}
    return numbers[0] == numbers[1] and len(units) < 2


def is_correct(text: str, solution: str) -> bool | None:
    """Whether the answer in a text is that of the solution; None where the solution has no answer."""
    gold = extract_answer(solution) or solution.strip()
    if not gold:
        return None
    if has_math_verify():
        return is_verified(text, solution)
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
    gold = parse(_marked(solution)) or parse(f"${solution}$")
    return bool(math_verify.verify(gold, parse(_marked(text)), timeout_seconds=seconds)) if gold else None


def _marked(text: str) -> str:
    """A text whose answer is a formula without marks, as a marked one: math-verify takes only numbers from plain text."""
    answer = text.rpartition("####")[2].strip()
    return f"${answer}$" if is_formula(answer) and not re.search(r"\\boxed|\$|\\[(\[]", answer) else text


def accuracy_reward(completions: Sequence[Completion], solution: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the answer of a completion is that of the column `solution`, else 0; None where that has none."""
    found = [is_correct(text_of(c), s) for c, s in zip(completions, solution, strict=True)]
    return [None if each is None else float(each) for each in found]


def reasoning_accuracy_reward(
    completions: Sequence[Completion],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] = ("</think>",),
    **_: Any,
) -> list[float | None]:
    """`accuracy_reward` of what follows the reasoning; 0 where the reasoning is not closed."""
    rewards: list[float | None] = []
    for completion, gold in zip(completions, solution, strict=True):
        text = text_of(completion)
        ends = [text.rfind(d) + len(d) for d in reasoning_delimiters if d in text]
        found = is_correct(text[max(ends) :] if ends else "", gold)
        rewards.append(None if found is None else float(found))
    return rewards


class get_cosine_scaled_reward:
    """Accuracy whose worth depends on length: right and short is best, wrong and short is worst.

    r = v + ½ (w − v) (1 + cos(π · length / max_len)), w at length 0 and v at `max_len`; right answers go from
    `max_value_correct` down to `min_value_correct`, wrong ones from `min_value_wrong` up to `max_value_wrong`
    (arXiv:2502.03373, appendix C.1). Lengths are in tokens, at most `max_len`.
    """

    __name__ = "cosine_scaled_reward"

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
        for completion, gold, ids in zip(completions, solution, completion_ids, strict=True):
            found = is_correct(text_of(completion), gold)
            if found is None:
                rewards.append(None)
                continue
            start, end = self.bounds[found]
            share = min(len(ids) / self.max_len, 1.0)
            rewards.append(end + (start - end) * (1 + math.cos(math.pi * share)) / 2)
        return rewards
