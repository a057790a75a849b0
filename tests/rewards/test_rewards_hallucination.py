"""POPE and CHAIR: numbers worked by hand."""

from __future__ import annotations

import pytest

from trl.errors import DataError
from trl.rewards.hallucination import ChairReward, chair_scores, pope_reward, pope_scores, says_yes

THINGS = {"dog": ["puppy"], "car": [], "fire hydrant": ["hydrant"], "bus": []}


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No.", False),
        ("There is not a dog. Yes.", False),
        ("There isn't any", False),
        ("Yes. There is no cat.", True),
        ("I notice a knot", True),
    ],
)
def test_yes_and_no(answer, yes):
    assert says_yes(answer) is yes


def test_pope_by_hand():
    """TP 1, FP 1, FN 1, TN 2."""
    answers = ["Yes", "yes, one", "No", "no", [{"role": "assistant", "content": "Not here"}]]
    labels = ["yes", "no", "yes", "no", False]
    scores = pope_scores(answers, labels)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert (scores.precision, scores.recall, scores.f1) == (0.5, 0.5, 0.5)
    assert scores.yes == pytest.approx(2 / 5)
    assert pope_reward(answers, labels) == [1, 0, 0, 1, 1]
    assert str(scores).split() == [
        "accuracy",
        "precision",
        "recall",
        "f1",
        "yes",
        *["0.600", "0.500", "0.500", "0.500", "0.400"],
    ]


def test_pope_without_a_yes():
    scores = pope_scores(["no", "no"], ["no", "no"])
    assert (scores.accuracy, scores.precision, scores.f1) == (1, 0, 0)


def test_pope_is_told_other_labels():
    with pytest.raises(DataError, match=r"label\[1\] is 'maybe'"):
        pope_reward(["yes", "no"], ["yes", "maybe"])
    with pytest.raises(DataError, match="no answers"):
        pope_scores([], [])


def test_chair_by_hand():
    """Five objects named, two of them not there; of three captions two hallucinate; three of four objects are found."""
    captions = ["Two puppies and a puppy by a car", "A red bus and fire hydrants", "Buses", ""]
    objects = [["dog", "car"], ["fire hydrant"], ["bus", "car"], []]
    scores = chair_scores(
        ["A puppy and dogs near cars", "a bus, fire hydrants", "A Bus and a dog"], objects[:3], THINGS
    )
    assert scores.chair_i == pytest.approx(2 / 6)
    assert scores.chair_s == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(4 / 5)
    assert scores.words == pytest.approx((6 + 4 + 5) / 3)
    assert chair_scores(captions[3:], objects[3:], THINGS).chair_i == 0


def test_the_reward_is_recall_less_hallucination():
    reward = ChairReward(THINGS, recall_weight=2.0)
    found = reward(["a dog and a bus", "a dog and a car", "nothing"], objects=[["dog", "car"]] * 3)
    assert found == pytest.approx([2 * 0.5 - 0.5, 2.0, 0.0])
    with pytest.raises(DataError, match="column 'objects'"):
        reward(["a dog"])
