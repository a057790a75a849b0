"""What the demo's reward model learns from."""

from __future__ import annotations

from datasets import Dataset

from trl.demo.grammar import split_sentences
from trl.demo.reviews import load_reviews
from trl.demo.steps import half_and_half, likest, opposites

GOOD = ["A. The plot is clever.", "B. I left humming.", "C. It sparkles all night.", "D. What a surprise."]
BAD = ["E. I left numb.", "F. The plot is dull.", "G. It drags all day.", "H. Skip it right now."]


def test_pairs_by_hand():
    rows = [{"text": text, "label": "positive"} for text in GOOD] + [{"text": text, "label": "negative"} for text in BAD]
    assert [(row["chosen"], row["rejected"]) for row in opposites(Dataset.from_list(rows))] == [
        ("A. The plot is clever.", "A. The plot is dull."),
        ("A. I left humming.", "A. I left numb."),
        ("F. I left humming.", "F. I left numb."),
        ("F. The plot is clever.", "F. The plot is dull."),
        ("C. It sparkles all night.", "C. It sparkles all day."),
        ("C. It sparkles all night.", "C. It sparkles all day."),
        ("H. What a surprise.", "H. Skip it a surprise."),
        ("H. What a surprise.", "H. What right now."),
    ]


def test_pairs_of_reviews_differ_in_their_end_alone():
    for row in opposites(load_reviews("test").select(range(40))):
        assert split_sentences(row["chosen"])[:-1] == split_sentences(row["rejected"])[:-1]


def test_the_likest_end_is_sought_from_a_number_on():
    reviews = [["A.", "It drags."], ["B.", "It sparkles."], ["C.", "It sings."]]
    assert likest("It sparkles.", reviews, 0) == "It sparkles."
    assert likest("It is.", reviews, 2) == "It sings."


def test_halves():
    assert half_and_half("a b c d", "e f g h i") == "a b g h i"
