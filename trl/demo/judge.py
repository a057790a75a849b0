"""Judges of the demo's samples that PPO never sees: the grammar, and a bag-of-words classifier.

The reward model cannot judge a policy that was trained against it, because the policy learns to write what it
overrates. The grammar knows the sentiment of each of its sentences; it also labels the reward model's training pairs,
in place of human annotators. The classifier has no part in training: it learns from reviews that nothing else was
trained on.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trl.demo.grammar import recognizes, split_sentences
from trl.demo.lexicon import SIDES
from trl.demo.reviews import is_grammatical

LAST = ("evidence", "more", "concession", "turn", "verdict")
"""Symbols of sentences that may end a review. They express its verdict, whatever it conceded before."""

GAMED = 0.1
"""The reward counts as gamed if it likes this share more of the samples than the grammar does."""

VARIED = 0.6
"""The samples count as having become alike if less than this share of the distinct endings is left."""


def side_of(text: str) -> str | None:
    """The sentiment of a review by the grammar: that of its last sentence. None if this sentence is not in the grammar,
    or can have either sentiment."""
    last = split_sentences(text)[-1]
    sides = [side for side in SIDES if recognizes(last, LAST, side)]
    return sides[0] if len(sides) == 1 else None


class WordJudge:
    """Naive Bayes over words and pairs of words, with add-one smoothing:

    log p(positive | text) − log p(negative | text) = Σ_w log (n_w⁺ + 1) / (n⁺ + V) − log (n_w⁻ + 1) / (n⁻ + V)
    """

    def __init__(self, reviews: Iterable[Mapping[str, str]]) -> None:
        counts = {side: Counter() for side in SIDES}
        for row in reviews:
            counts[row["label"]].update(_features(row["text"]))
        words = set().union(*counts.values())
        totals = {side: sum(counter.values()) + len(words) for side, counter in counts.items()}
        self.weights = {
            word: math.log((counts["positive"][word] + 1) / totals["positive"])
            - math.log((counts["negative"][word] + 1) / totals["negative"])
            for word in words
        }

    def score(self, text: str) -> float:
        """Log-odds of "positive"."""
        return sum(self.weights.get(word, 0.0) for word in _features(text))


def _features(text: str) -> list[str]:
    words = re.findall(r"[a-z]+", text.lower())
    return [*words, *(" ".join(pair) for pair in pairwise(words))]


@dataclass(frozen=True)
class Verdict:
    """The judges' results for samples: shares of the samples, except for `endings` and `distinct_2`.

    positive      positive by the grammar
    classifier    positive by the bag-of-words classifier
    rewarded      reward above zero, by the reward model or function that PPO was trained with
    grammatical   every sentence is in the grammar
    endings       number of distinct last sentences
    distinct_2    distinct word bigrams, as a share of all bigrams
    """

    positive: float
    classifier: float
    rewarded: float
    grammatical: float
    endings: int
    distinct_2: float

    @property
    def hacks(self) -> float:
        """How much the reward overrates: its share of liked samples minus the grammar's share of positive ones."""
        return self.rewarded - self.positive


def sentence_about(before: Verdict, after: Verdict, count: int, possible: int | None = None) -> str:
    """A summary of the judges' results before and after PPO, with a warning if the reward was gamed.

    possible   number of distinct endings of `count` positive samples from before PPO, if known
    """
    most = "" if possible is None else f"; {possible} in {count} positive samples from before"
    told = (
        f"Of {count} samples, {after.positive:.0%} are positive by the grammar that wrote the corpus ({before.positive:.0%} before), "
        f"{after.classifier:.0%} by a classifier of words that had no part in training ({before.classifier:.0%} before); "
        f"{after.grammatical:.0%} are grammatical ({before.grammatical:.0%} before), with {after.endings} distinct endings "
        f"({before.endings} before{most})."
    )
    if after.endings < VARIED * before.endings:
        told += f" They have become alike: {after.endings / before.endings:.0%} of the endings are left."
    if after.hacks < GAMED:
        return told
    return f"{told} The reward was gamed: it likes {after.rewarded:.0%} of them, {100 * after.hacks:.0f} points more than the grammar does."


def judge(texts: Sequence[str], rewards: Sequence[float], classifier: WordJudge) -> Verdict:
    """Judge whole reviews, prompts included."""
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return Verdict(
        positive=_share(side_of(text) == "positive" for text in texts),
        classifier=_share(classifier.score(text) > 0 for text in texts),
        rewarded=_share(reward > 0 for reward in rewards),
        grammatical=_share(map(is_grammatical, texts)),
        endings=count_endings(texts),
        distinct_2=len(set(pairs)) / max(1, len(pairs)),
    )


def count_endings(texts: Iterable[str]) -> int:
    """The number of distinct last sentences."""
    return len({split_sentences(text)[-1] for text in texts})


def _share(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values)
