"""Judges that had no part in training: what they say of reviews whose side is known."""

from __future__ import annotations

import pytest

from trl.demo.grammar import split_sentences
from trl.demo.judge import Verdict, WordJudge, judge, sentence_about, side_of
from trl.demo.reviews import load_reviews

REVIEWS = load_reviews("test").select(range(200))


def test_the_grammar_knows_the_side_of_every_review():
    assert [side_of(row["text"]) for row in REVIEWS] == REVIEWS["label"]


def test_the_last_sentence_decides_and_has_to_be_one():
    good = next(row["text"] for row in REVIEWS if row["label"] == "positive")
    bad = next(row["text"] for row in REVIEWS if row["label"] == "negative")
    assert side_of(f"{good} {split_sentences(bad)[-1]}") == "negative"
    assert side_of(f"{good[:-1]} very.") is None
    assert side_of("") is None


def test_the_classifier_weighs_words_by_hand():
    judge = WordJudge([{"text": "good", "label": "positive"}, {"text": "bad bad", "label": "negative"}])
    # words good, bad, "bad bad": n+ = 1 + 3, n- = 3 + 3; good: log (2/4) - log (1/6) = log 3; bad: log (1/4) - log (3/6)
    assert judge.score("good") == pytest.approx(1.0986, abs=1e-4)
    assert judge.score("bad") == pytest.approx(-0.6931, abs=1e-4)
    assert judge.score("unknown") == 0


def test_the_classifier_tells_reviews_that_it_has_not_seen():
    classifier = WordJudge(load_reviews("test"))
    rows = load_reviews("train").select(range(200))
    right = [(classifier.score(row["text"]) > 0) == (row["label"] == "positive") for row in rows]
    assert sum(right) / len(right) > 0.7


def test_a_verdict_by_hand():
    texts = [row["text"] for row in REVIEWS.select(range(4))]
    verdict = judge([*texts, "Loved every minute almost I."], [1.0, -1.0, 1.0, 0.0, 2.0], WordJudge(REVIEWS))
    positive = sum(row["label"] == "positive" for row in REVIEWS.select(range(4)))
    assert (verdict.positive, verdict.rewarded, verdict.grammatical) == (positive / 5, 0.6, 0.8)
    assert verdict.endings == 5
    assert verdict.hacks == pytest.approx(0.6 - positive / 5)


def test_a_reward_that_was_gamed_is_said_to_be():
    before = Verdict(0.4, 0.4, 0.5, 0.9, 50, 0.5)
    honest, gamed = Verdict(0.95, 0.9, 0.97, 0.9, 40, 0.5), Verdict(0.6, 0.7, 0.97, 0.9, 5, 0.2)
    assert "gamed" not in sentence_about(before, honest, 100)
    assert "alike" not in sentence_about(before, honest, 100)
    assert "alike: 10% of the endings are left" in sentence_about(before, gamed, 100)
    assert "The reward was gamed: it likes 97% of them, 37 points more" in sentence_about(before, gamed, 100)
    assert "40 distinct endings (50 before; 45 in 100 positive samples from before)." in sentence_about(
        before, honest, 100, 45
    )
