"""What the demo's reward model learns from."""

from __future__ import annotations

import pytest
from datasets import Dataset
from torch import nn

from trl.demo.grammar import split_sentences
from trl.demo.reviews import load_reviews
from trl.demo.steps import half_and_half, likest, opposites, value_first
from trl.trainers.ppo.config import PPOConfig

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


@pytest.mark.parametrize(
    ("steps", "at", "rates"),
    [
        (52, 0, [0.0, 1e-3]),
        (52, 3, [0.0, 1e-3]),
        (52, 4, [3e-4, 1e-3]),
        (52, 28, [1.5e-4, 5e-4]),
        (52, 52, [0.0, 0.0]),
        (2, 0, [3e-4, 1e-3]),
        (2, 1, [1.5e-4, 5e-4]),
    ],
)
def test_values_learn_alone_at_first(steps, at, rates, tmp_path):
    policy, value = nn.Linear(2, 2), nn.Linear(2, 1)
    args = PPOConfig(output_dir=str(tmp_path), max_steps=steps, learning_rate=3e-4)
    optimizer, schedule = value_first(policy, value, args)
    for _ in range(at):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx(rates)
    assert [group["params"] for group in optimizer.param_groups] == [
        list(policy.parameters()),
        list(value.parameters()),
    ]
