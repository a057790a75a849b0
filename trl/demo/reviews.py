"""Short film reviews with a sentiment, written by a grammar: the corpus of the demo and of the learning tests.

    load_reviews("train"), load_reviews("test")    columns `text` and `label`, "positive" or "negative", half each

They are generated on first use, in about two seconds, from a fixed seed: the same for everyone, and all distinct.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

from trl.demo.grammar import Writer, name_once, recognizes, split_sentences
from trl.demo.lexicon import PLANS, SIDES
from trl.errors import DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

SIZES = {"train": 6000, "test": 600}
SEED = 1895
WORDS = range(18, 43)
"""Allowed lengths of a review, in words."""


@dataclass(frozen=True, slots=True)
class Review:
    """`label` is "positive" or "negative": the verdict, whatever the review concedes."""

    text: str
    label: str


def write_review(rng: random.Random, label: str) -> Review:
    """Write a review: a neutral opening, then sentences that support the label."""
    while True:
        writer = Writer(rng, SIDES[label])
        opening = writer.opening()
        text = " ".join([opening, *map(writer.sentence, rng.choice(PLANS))])
        for person in writer.people:
            text = name_once(text, person)
        if len(text.split()) in WORDS:
            return Review(text, label)


def write_reviews(seed: int = SEED) -> Iterator[Review]:
    """Generate distinct reviews endlessly, alternately positive and negative. The same seed gives the same reviews."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        for label in SIDES:
            review = write_review(rng, label)
            while review.text in seen:
                review = write_review(rng, label)
            seen.add(review.text)
            yield review


def load_reviews(split: str = "train") -> Dataset:
    """The reviews of a split ("train": 6,000, "test": 600) as a dataset with columns `text` and `label`.

    Raises DataError for another split.
    """
    from datasets import Dataset

    if split not in SIZES:
        raise DataError(unknown("split of the demo's reviews", split, SIZES))
    return Dataset.from_list([asdict(review) for review in _corpus()[split]])


@cache
def _corpus() -> Mapping[str, tuple[Review, ...]]:
    """All splits, taken from one stream of distinct reviews, so that they do not overlap."""
    reviews = write_reviews()
    return {split: tuple(islice(reviews, size)) for split, size in SIZES.items()}


def is_grammatical(text: str) -> bool:
    """True if a text is built like a review: an opening, then complete sentences of the grammar."""
    opening, *rest = split_sentences(text)
    return recognizes(opening, ["opening"]) and all(recognizes(sentence, _AFTER_OPENING) for sentence in rest)


_AFTER_OPENING = sorted({symbol for plan in PLANS for symbol in plan})
