"""Step 2's preferences: an annotator compares reviews that begin alike, those of the fine-tuned model and one of the corpus.

The annotator stands for people who label, and is played by the grammar: the better of two reviews is the one of the positive
side, and one of neither side is better than a negative one. Of two that are equally good it says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from datasets import Dataset

from trl.demo.judge import side_of
from trl.demo.sample import prompt_openings, sample

DRAFTS = 3
"""Reviews that the model writes from every opening."""

BATCH = 200
"""Openings that are continued at a time."""

RANK = {"positive": 1, None: 0, "negative": -1}


def annotate(model: Any, tokenizer: Any, reviews: Dataset, *, temperature: float, seed: int) -> Dataset:
    """Pairs of `chosen` and `rejected` reviews that begin alike: each of `reviews` and the model's own with its opening."""
    pairs = []
    for rows in reviews.iter(BATCH):
        prompts = prompt_openings([{"text": text} for text in rows["text"]])
        drafts = [sample(model, tokenizer, prompts, temperature=temperature, seed=seed + n) for n in range(DRAFTS)]
        pairs += [pair for texts in zip(rows["text"], *drafts, strict=True) for pair in preferences(texts)]
    return Dataset.from_list(pairs)


def preferences(texts: Iterable[str]) -> list[dict[str, str]]:
    """What the annotator says of every two texts of which one is better."""
    ranked = [(RANK[side_of(text)], text) for text in texts]
    pairs = [sorted(pair, reverse=True) for pair in combinations(ranked, 2)]
    return [{"chosen": better, "rejected": worse} for (high, better), (low, worse) in pairs if high > low]
