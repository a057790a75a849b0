"""Answers beside their prompts: what of them is learned, and prompts that they repeat."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from trl.data.columns import Columns
from trl.data.messages import is_trained

logger = logging.getLogger(__name__)


def without_prompts(prompts: Sequence[list[Any]], answers: Sequence[list[Any]]) -> list[list[Any]]:
    """Answers without the prompt where they repeat it: whole conversations, that is."""
    return [
        answer[len(prompt) :] if len(answer) > len(prompt) and answer[: len(prompt)] == prompt else answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def say_repeated(columns: Columns, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
    """Warn where all answers of all rows begin with their prompt, which stands twice then."""
    if all(
        len(p) > 1 and all(text.startswith(p) for text in texts) for p, *texts in zip(prompts, *answers, strict=True)
    ):
        logger.warning(
            f"Row {columns.rows[0] + 1} and those after it begin with their prompt a second time in the answers: leave the column "
            "'prompt' out, or the prompt out of the answers."
        )


def check_learned(columns: Columns, answers: Mapping[str, Sequence[list[dict[str, Any]]]]) -> None:
    """Raises DataError for a message of an answer that is not to be learned from, where answers are learned whole."""
    for name, chats in answers.items():
        for k, chat in enumerate(chats):
            left_out = next((i for i, message in enumerate(chat) if not is_trained(message)), None)
            if left_out is not None:
                remedy = "set assistant_only_loss=True, or " if name == "completion" and "label" not in columns else ""
                raise columns.error(
                    k,
                    name,
                    f"message {left_out + 1} says that it is not learned from, and answers are learned whole: {remedy}leave the key "
                    "out, or the row.",
                )
