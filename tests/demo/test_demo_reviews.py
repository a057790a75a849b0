"""The corpus: the same for everyone, distinct, balanced, well formed, learnable and not by one word."""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache
from itertools import islice

import pytest
import torch

from trl.demo.grammar import fix_articles, name_once, recognizes
from trl.demo.lexicon import ASPECTS, GRAMMAR, PLANS, SIDES, plural
from trl.demo.reviews import SIZES, Review, is_grammatical, load_reviews, write_review, write_reviews
from trl.errors import DataError


@cache
def corpus(split: str) -> list[Review]:
    return [Review(**row) for row in load_reviews(split)]


def everything() -> list[Review]:
    return corpus("train") + corpus("test")


def words(review: Review, count: int | None = None) -> set[str]:
    return set(re.findall(r"[\w'-]+", " ".join(review.text.lower().split()[:count])))


def naive_bayes(count: int | None = None) -> float:
    """Held-out accuracy of Bernoulli naive Bayes on the words (of the first `count`), add-one smoothing."""
    train, test = corpus("train"), corpus("test")
    column = {word: index for index, word in enumerate(sorted(set().union(*(words(r, count) for r in train))))}

    def features(reviews: list[Review]) -> tuple[torch.Tensor, torch.Tensor]:
        present = torch.zeros(len(reviews), len(column))
        for row, review in enumerate(reviews):
            present[row, [column[word] for word in words(review, count) if word in column]] = 1
        return present, torch.tensor([review.label == "positive" for review in reviews])

    present, positive = features(train)
    good, bad = ((present[rows].sum(0) + 1) / (rows.sum() + 2) for rows in (positive, ~positive))
    present, positive = features(test)
    odds = present @ (good / bad).log() + (1 - present) @ ((1 - good) / (1 - bad)).log()
    return ((odds > 0) == positive).float().mean().item()


def test_the_corpus_is_the_same_everywhere():
    texts = "\n".join(review.text for review in everything())
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "5c1525dafa7bbac43f0a5256d14bbc45da43c5d3db035b59a462b4b1c2266e31"
    )


def test_the_seed_decides():
    first, again, other = (list(islice(write_reviews(seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)


def test_splits_are_sized_balanced_and_distinct():
    assert [len(corpus("train")), len(corpus("test"))] == [6000, 600]
    assert len({review.text for review in everything()}) == 6600
    for split in SIZES:
        labels = [review.label for review in corpus(split)]
        assert labels.count("positive") == labels.count("negative") == len(labels) // 2


def test_columns_are_text_and_label():
    assert load_reviews("test").column_names == ["text", "label"]


def test_unknown_split_is_named_with_a_suggestion():
    with pytest.raises(DataError, match=r"Unknown split of the demo's reviews 'tests'\. Did you mean 'test'"):
        load_reviews("tests")


def test_reviews_are_short():
    lengths = [len(review.text.split()) for review in everything()]
    assert min(lengths) >= 18
    assert max(lengths) <= 42
    assert {len(re.findall(r"\.(?: |$)", review.text)) for review in everything()} <= {2, 3, 4}


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("an unfilled slot or an alternative", r"[{}|/_]"),
        ("two spaces", r"\s\s"),
        ("space at either end", r"^\s|\s$"),
        ("space before punctuation", r" [.,;:]"),
        ("punctuation run together", r"[.,;:][.,;:]|[.,;:]\w"),
        ("a sentence without a capital", r"(^|\. )[^A-Z]"),
        ("no full stop", r"[^.]$"),
        ("a for an", r"\b[Aa] [aeiouAEIOU]"),
        ("an for a", r"\b[Aa]n [^aeiouAEIOU]"),
        ("a word twice", r"\b(\w+) \1\b"),
        ("a character outside ASCII", r"[^\x20-\x7e]"),
        ("British spelling", r"(?i)\b(colour|humour|theatre|grey|centre|favour|travell)"),
    ],
)
def test_no_review_has(what, pattern):
    assert [review.text for review in everything() if re.search(pattern, review.text)][:3] == [], what


def test_reviews_are_varied():
    firsts = [" ".join(review.text.split()[:3]) for review in everything()]
    assert max(firsts.count(first) for first in set(firsts)) < 0.1 * len(firsts)
    assert len(set().union(*map(words, everything()))) > 900


def test_words_tell_the_label_but_not_all_of_it():
    assert 0.88 < naive_bayes() < 0.98


@pytest.mark.parametrize("count", [4, 6, 8])
def test_openings_are_neutral(count):
    assert 0.44 < naive_bayes(count) < 0.56


def test_no_word_decides():
    """A word that stands on one side only (95 % or more) is in few reviews."""
    seen: dict[str, list[int]] = {}
    for review in everything():
        for word in words(review):
            seen.setdefault(word, [0, 0])[review.label == "positive"] += 1
    decisive = {word: sum(counts) for word, counts in seen.items() if max(counts) >= 0.95 * sum(counts)}
    assert max(decisive.values()) < 0.04 * len(everything())


@pytest.mark.parametrize(
    ("raw", "right"),
    [
        ("a actor and a old map", "an actor and an old map"),
        ("A Orchard in a island prison", "An Orchard in an island prison"),
        ("a hour, a honest man, a heir", "an hour, an honest man, an heir"),
        ("a one-act play, a university, a useful hat", "a one-act play, a university, a useful hat"),
        ("a unimaginative plot in a western", "an unimaginative plot in a western"),
        ("Ada as extra", "Ada as extra"),
    ],
)
def test_articles(raw, right):
    assert fix_articles(raw) == right


def test_a_person_is_named_in_full_once():
    text = "Ada Quill directs. Ada Quill errs, and I like Ada Quill."
    assert name_once(text, "Ada Quill") == "Ada Quill directs. Quill errs, and I like Quill."


def test_plural():
    assert [plural("ghost story"), plural("western")] == ["ghost stories", "westerns"]


def test_every_slot_names_a_symbol():
    known = set(GRAMMAR) | {f"{stem}_{side}" for stem in ASPECTS for side in ("good", "bad")} | {"pro", "con"}
    known |= {re.sub("good$", side, name) for name in GRAMMAR if name.endswith("_good") for side in ("pro", "con")}
    slots = {slot for entries in GRAMMAR.values() for entry in entries for slot in re.findall(r"\{(\w+)\}", entry)}
    assert slots | {symbol for plan in PLANS for symbol in plan} <= known


def test_both_sides_have_like_many_ways_to_say_it():
    for name in [name for name in GRAMMAR if name.endswith("_good")]:
        good, bad = len(GRAMMAR[name]), len(GRAMMAR[name.removesuffix("good") + "bad"])
        assert abs(good - bad) <= 5, name


def test_the_grammar_recognizes_what_it_writes():
    rng = random.Random(7)
    assert all(is_grammatical(write_review(rng, label).text) for label in SIDES for _ in range(100))


@pytest.mark.parametrize(
    ("sentence", "right"),
    [
        ("The script sparkles, but the songs drown every quiet moment.", True),
        ("The speeches sparkle, and the acting is warm and precise.", True),
        ("The script sparkle, but the songs drown every quiet moment.", False),
        ("The script sparkles, but the songs drown every quiet.", False),
        ("the script sparkles.", False),
        ("What an dull letdown.", False),
        ("What a dull letdown.", True),
        ("", False),
    ],
)
def test_recognizes(sentence, right):
    assert recognizes(sentence, ["evidence", "concession", "verdict"]) is right


def test_text_that_stops_short_is_not_grammatical():
    text = corpus("test")[0].text
    assert is_grammatical(text)
    assert not is_grammatical(text[:-1])
    assert not is_grammatical(text[:-5])
    assert not is_grammatical(text + " The the.")
