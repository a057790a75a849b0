"""What the demo's reward model learns from."""

from __future__ import annotations

import pytest
from datasets import Dataset

from trl.demo.grammar import split_sentences
from trl.demo.reviews import load_reviews
from trl.demo.steps import half_and_half, likest, opposites

GOOD = ["A. The plot is clever.", "B. I left humming.", "C. It sparkles all night.", "D. It is a treat."]
BAD = ["E. I left numb.", "F. The plot is dull.", "G. It drags all day.", "H. That is a bore."]


def test_pairs_by_hand():
    rows = [{"text": text, "label": "positive"} for text in GOOD] + [
        {"text": text, "label": "negative"} for text in BAD
    ]
    assert [(row["chosen"], row["rejected"]) for row in opposites(Dataset.from_list(rows))] == [
        ("A. The plot is clever.", "A. The plot is dull."),
        ("A. I left humming.", "A. I left numb."),
        ("B. I left humming.", "B. I left numb."),
        ("B. The plot is clever.", "B. The plot is dull."),
        ("C. It sparkles all night.", "C. It sparkles all day."),
        ("C. It sparkles all night.", "C. It sparkles all day."),
        ("D. It is a treat.", "D. That is a treat."),
        ("D. It is a treat.", "D. That is a treat."),
    ]


def test_pairs_of_reviews_differ_in_their_end_alone():
    for row in opposites(load_reviews("test").select(range(40))):
        assert split_sentences(row["chosen"])[:-1] == split_sentences(row["rejected"])[:-1]


def test_the_likest_end_is_sought_from_a_number_on():
    reviews = [["A.", "It drags."], ["B.", "It sparkles."], ["C.", "It sings."]]
    assert likest("It sparkles.", reviews, 0) == "It sparkles."
    assert likest("It is.", reviews, 2) == "It sings."


@pytest.mark.parametrize(
    ("first", "second", "mixed"),
    [
        ("a b c d", "e f g h i", "a b g h i"),
        ("what a fine surprise", "what a dull letdown", "what a fine letdown"),
        ("the plot is fine", "the plot is dull", "the plot is dull"),
        ("so it ends well again", "so it is long again", "so it ends long again"),
        ("a", "a", "a"),
    ],
)
def test_half_of_what_differs(first, second, mixed):
    assert half_and_half(first, second) == mixed
