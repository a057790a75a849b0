"""A context-free grammar in two directions: `Writer` writes text from it, `recognizes` tells whether text is its.

The grammar is `lexicon.GRAMMAR`: symbol → alternatives with `{slots}`. What is not context-free is done after
writing: `a` becomes `an` by sound, sentences begin with a capital, a person is named in full once and by surname then.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from trl.demo.lexicon import ASPECTS, GRAMMAR, plural

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa])(?= (?i:hour|honest|heir|(?!one\b|once\b|use|eu|uni(?![mn]))[aeiou]))")


class Writer:
    """Writes the sentences of one review; the same people, title and genre throughout, and no phrase twice."""

    def __init__(self, rng: random.Random, side: Mapping[str, str]) -> None:
        self.rng = rng
        self.side = side
        self.used: set[str] = set()
        self.aspects = rng.sample(list(ASPECTS), len(ASPECTS))
        self.bound: dict[str, str] = {}
        for name in ("title", "director", "actor", "genre"):
            self.bound[name] = self._choose(name)
        self.people = (self.bound["director"], self.bound["actor"])
        self.bound["genres"] = plural(self.bound["genre"])

    def opening(self) -> str:
        """The first sentence. Whom it does not introduce goes by role from there on."""
        sentence = self.sentence("opening")
        for name, role in (("director", "the director"), ("actor", "the lead")):
            if self.bound[name] not in sentence:
                self.bound[name] = role
        return sentence

    def sentence(self, symbol: str) -> str:
        """One sentence, with articles and its first letter set right."""
        return capitalize(fix_articles(self._choose(symbol)))

    def _choose(self, symbol: str) -> str:
        fresh = [entry for entry in GRAMMAR[symbol] if entry not in self.used]
        entry = self.rng.choice(fresh or GRAMMAR[symbol])
        self.used.add(entry)
        return _SLOT.sub(lambda slot: self._fill(slot[1]), entry)

    def _fill(self, slot: str) -> str:
        if slot in self.bound:
            return self.bound[slot]
        if slot in self.side:  # a clause: each takes up another aspect of the film
            return self._choose(f"{self.aspects.pop()}_{self.side[slot]}")
        stem, _, end = slot.rpartition("_")
        return self._choose(f"{stem}_{self.side[end]}" if end in self.side else slot)


def fix_articles(text: str) -> str:
    """`a old map` → `an old map`; `a one-act play` and `a university` stay."""
    return _ARTICLE.sub(lambda article: article[1] + "n", text)


def capitalize(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def name_once(text: str, name: str) -> str:
    """The full name where it stands first, the surname everywhere after."""
    head, full, tail = text.partition(name)
    return head + full + tail.replace(name, name.rpartition(" ")[2])


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


def recognizes(sentence: str, symbols: Sequence[str]) -> bool:
    """Whether the whole sentence can be derived from one of the symbols, whichever side it takes."""
    plain = re.sub(r"\b([Aa])n ", r"\1 ", sentence)
    if capitalize(fix_articles(plain)) != sentence:
        return False
    return any(len(plain) in _ends(symbol, plain.lower(), 0, {}) for symbol in symbols)


_Memo = dict[tuple[str, int], frozenset[int]]


def _ends(symbol: str, text: str, start: int, memo: _Memo) -> frozenset[int]:
    """Where a phrase derived from `symbol` may end if it begins at `start`."""
    if (symbol, start) not in memo:
        found = (_sequence_ends(parts, text, start, memo) for parts in _PARTS[symbol])
        memo[symbol, start] = frozenset().union(*found)
    return memo[symbol, start]


def _sequence_ends(parts: Sequence[str], text: str, start: int, memo: _Memo) -> set[int]:
    """`parts` alternates between literal text and symbols, and begins and ends with text."""
    ends = {start}
    for index, part in enumerate(parts):
        if index % 2:
            ends = {end for begin in ends for end in _ends(part, text, begin, memo)}
        else:
            ends = {end + len(part) for end in ends if text.startswith(part, end)}
    return ends


def _both_sides() -> dict[str, tuple[str, ...]]:
    """The grammar in which `_pro` and `_con` stand for either sentiment and people may go by their surname."""
    clauses = tuple(f"{{{aspect}_{sentiment}}}" for aspect in ASPECTS for sentiment in ("good", "bad"))
    either = {"pro": clauses, "con": clauses}
    for stem in (name.removesuffix("_good") for name in GRAMMAR if name.endswith("_good")):
        either |= dict.fromkeys((f"{stem}_pro", f"{stem}_con"), (f"{{{stem}_good}}", f"{{{stem}_bad}}"))
    people = {
        "director": (*GRAMMAR["director"], "{last}", "the director"),
        "actor": (*GRAMMAR["actor"], "{last}", "the lead"),
    }
    return GRAMMAR | either | people


_PARTS = {
    symbol: tuple(tuple(_SLOT.split(entry.lower())) for entry in entries) for symbol, entries in _both_sides().items()
}
