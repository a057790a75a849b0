"""What the demo's reward model learns from."""

from __future__ import annotations

from datasets import Dataset

from trl.demo.steps import half_and_half, opposites

GOOD, BAD = "A film. It sparkles all night.", "A play. It drags and drags on."


def test_pairs_grow_harder_in_turn():
    reviews = Dataset.from_list(
        [{"text": text, "label": label} for text, label in ((GOOD, "positive"), (BAD, "negative"))] * 3
    )
    assert list(opposites(reviews)) == [
        {"chosen": GOOD, "rejected": BAD},
        {"chosen": GOOD, "rejected": "A film. It drags and drags on."},
        {"chosen": GOOD, "rejected": "A film. It drags all night."},
    ]


def test_halves():
    assert half_and_half("a b c d", "e f g h i") == "a b g h i"
