"""Step 2's preferences: an annotator compares reviews that begin alike, those of the fine-tuned model and one of the corpus.

The annotator stands for people who label, and is played by the grammar: a positive review is better than one that is negative,
takes both sides or is no sentence. Of two that are both positive, or neither, it says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import Any

from datasets import Dataset

from trl.demo.judge import side_of
from trl.demo.sample import prompt_openings, sample

DRAFTS = 3
"""Reviews that the model writes from every opening."""

BATCH = 200
"""Openings that are continued at a time."""


def annotate(model: Any, tokenizer: Any, reviews: Dataset, *, temperature: float, seed: int) -> Dataset:
    """Pairs of `chosen` and `rejected` reviews that begin alike: each of `reviews` and the model's own with its opening."""
    pairs = []
    for batch, rows in enumerate(reviews.iter(BATCH)):
        write = partial(sample, model, tokenizer, prompt_openings([{"text": text} for text in rows["text"]]))
        first = seed + batch * DRAFTS
        drafts = [write(temperature=temperature, seed=number) for number in range(first, first + DRAFTS)]
        pairs += [pair for texts in zip(rows["text"], *drafts, strict=True) for pair in preferences(texts)]
    return Dataset.from_list(pairs)


def preferences(texts: Iterable[str]) -> list[dict[str, str]]:
    """What the annotator says of every two texts of which one is better."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for text in texts:
        sides[side_of(text) == "positive"].append(text)
    return [{"chosen": better, "rejected": worse} for better, worse in product(sides[True], sides[False])]
