"""The preference pairs of step 2: an annotator compares reviews with the same opening, by the model and from the
corpus.

The grammar plays the human annotator: it prefers a positive review to one that is negative, ambiguous or ungrammatical.
Two positive reviews, or two others, make no pair.
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
"""Number of reviews that the model writes per opening."""

BATCH = 200
"""Openings per sampling batch."""


def annotate(model: Any, tokenizer: Any, reviews: Dataset, *, temperature: float, seed: int) -> Dataset:
    """Pairs of `chosen` and `rejected` reviews with the same opening: from `reviews`, and sampled from the model."""
    pairs = []
    for batch, rows in enumerate(reviews.iter(BATCH)):
        write = partial(sample, model, tokenizer, prompt_openings([{"text": text} for text in rows["text"]]))
        first = seed + batch * DRAFTS
        drafts = [write(temperature=temperature, seed=number) for number in range(first, first + DRAFTS)]
        pairs += [pair for texts in zip(rows["text"], *drafts, strict=True) for pair in preferences(texts)]
    return Dataset.from_list(pairs)


def preferences(texts: Iterable[str]) -> list[dict[str, str]]:
    """All pairs of a positive text (`chosen`) and another one (`rejected`)."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    for text in texts:
        sides[side_of(text) == "positive"].append(text)
    return [{"chosen": better, "rejected": worse} for better, worse in product(sides[True], sides[False])]
