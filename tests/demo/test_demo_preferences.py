"""What the demo's reward model learns from: comparisons of reviews that begin alike."""

from __future__ import annotations

import pytest
import torch

from trl.demo.model import make_model, train_tokenizer
from trl.demo.preferences import DRAFTS, annotate, preferences
from trl.demo.reviews import load_reviews
from trl.demo.sample import prompt_openings

OPENING = "In Salt Anchor, a nurse returns home after ten years. "
GOOD, ALSO_GOOD = OPENING + "The script sparkles.", OPENING + "I loved almost every minute."
MIXED = OPENING + "A delightful and drab piece of work."
BAD = OPENING + "The script is flat and obvious."


@pytest.mark.parametrize(
    ("texts", "pairs"),
    [
        ([BAD, GOOD], [(GOOD, BAD)]),
        ([MIXED, GOOD], [(GOOD, MIXED)]),
        ([MIXED, BAD], []),
        ([GOOD, ALSO_GOOD], []),
        (
            [GOOD, BAD, ALSO_GOOD, MIXED],
            [(GOOD, BAD), (GOOD, MIXED), (ALSO_GOOD, BAD), (ALSO_GOOD, MIXED)],
        ),
    ],
)
def test_what_the_annotator_prefers(texts, pairs):
    assert sorted((pair["chosen"], pair["rejected"]) for pair in preferences(texts)) == sorted(pairs)


def test_reviews_that_are_compared_begin_alike():
    reviews = load_reviews("test").select(range(6))
    tokenizer = train_tokenizer(reviews["text"], vocab_size=300)
    torch.manual_seed(0)
    model = make_model(tokenizer, width=32, depth=1)
    pairs, again = (list(annotate(model, tokenizer, reviews, temperature=0.5, seed=1)) for _ in range(2))
    assert pairs == again
    # The model knows nothing: what it writes is worse than a positive review, and no better than a negative one.
    positive = reviews.filter(lambda row: row["label"] == "positive")
    assert [pair["chosen"] for pair in pairs] == [text for text in positive["text"] for _ in range(DRAFTS)]
    openings = [opening for opening in prompt_openings(positive) for _ in range(DRAFTS)]
    assert all(pair["rejected"].startswith(opening) for pair, opening in zip(pairs, openings, strict=True))
