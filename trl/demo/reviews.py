"""Short film reviews with a sentiment, written by a grammar: the corpus of the demo and of the learning tests.

The committed files `data/train.jsonl` and `data/test.jsonl` (columns `text` and `label`, "positive" or "negative",
half each, all texts distinct) are what this module writes:

    python -m trl.demo.reviews --out trl/demo/data
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trl.demo.grammar import Writer, name_once, recognizes, split_sentences
from trl.demo.lexicon import PLANS, SIDES
from trl.errors import DataError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

DATA = Path(__file__).parent / "data"
SIZES = {"train": 6000, "test": 600}
SEED = 1895
WORDS = range(18, 43)
"""How long a review may be, in words."""


@dataclass(frozen=True, slots=True)
class Review:
    """`label` is "positive" or "negative": the verdict, whatever the review concedes."""

    text: str
    label: str


def write_review(rng: random.Random, label: str) -> Review:
    """A neutral opening, then sentences that bear out the label."""
    while True:
        writer = Writer(rng, SIDES[label])
        opening = writer.opening()
        text = " ".join([opening, *map(writer.sentence, rng.choice(PLANS))])
        for person in writer.people:
            text = name_once(text, person)
        if len(text.split()) in WORDS:
            return Review(text, label)


def write_reviews(seed: int = SEED) -> Iterator[Review]:
    """Distinct reviews without end, alternately positive and negative. The same seed, the same reviews."""
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
    """The shipped reviews of a split ("train": 6,000, "test": 600) as a dataset with columns `text` and `label`.

    Raises DataError for another split.
    """
    from datasets import Dataset

    if split not in SIZES:
        raise DataError(unknown("split of the demo's reviews", split, SIZES))
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def is_grammatical(text: str) -> bool:
    """Whether a text, sampled perhaps, is built like a review: an opening, then whole sentences of the grammar."""
    opening, *rest = split_sentences(text)
    return recognizes(opening, ["opening"]) and all(recognizes(sentence, _AFTER_OPENING) for sentence in rest)


_AFTER_OPENING = sorted({symbol for plan in PLANS for symbol in plan})


def write_files(folder: Path, seed: int = SEED) -> None:
    """Writes `train.jsonl` and `test.jsonl`, one review a line."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews = write_reviews(seed)
    for split, size in SIZES.items():
        lines = [json.dumps(asdict(review)) + "\n" for review in islice(reviews, size)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's film reviews.")
    parser.add_argument("--out", type=Path, default=DATA, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_files(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
