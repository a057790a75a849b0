"""A context-free grammar that generates and parses: `Writer` writes text, `recognizes` tests if text is in the
language.

The grammar is `lexicon.GRAMMAR`: symbol → alternatives with `{slots}`. Rules that are not context-free are applied
afterwards: `a` becomes `an` by sound, sentences start with a capital, and people go by surname after the first mention.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache

from trl.demo.lexicon import ASPECTS, GRAMMAR, SIDES, plural

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa])(?= (?i:hour|honest|heir|(?!one\b|once\b|use|eu|uni(?![mn]))[aeiou]))")


class Writer:
    """Writes the sentences of one review, with the same people, title and genre throughout, and without repeating
    phrases."""

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
        """The first sentence. People whom it does not name are called by their role afterwards."""
        sentence = self.sentence("opening")
        for name, role in (("director", "the director"), ("actor", "the lead")):
            if self.bound[name] not in sentence:
                self.bound[name] = role
        return sentence

    def sentence(self, symbol: str) -> str:
        """One sentence, with correct articles and a capital first letter."""
        return capitalize(fix_articles(self._choose(symbol)))

    def _choose(self, symbol: str) -> str:
        fresh = [entry for entry in GRAMMAR[symbol] if entry not in self.used]
        entry = self.rng.choice(fresh or GRAMMAR[symbol])
        self.used.add(entry)
        return _SLOT.sub(lambda slot: self._fill(slot[1]), entry)

    def _fill(self, slot: str) -> str:
        if slot in self.bound:
            return self.bound[slot]
        if slot in self.side:  # a clause; each is about another aspect of the film
            return self._choose(f"{self.aspects.pop()}_{self.side[slot]}")
        stem, _, end = slot.rpartition("_")
        return self._choose(f"{stem}_{self.side[end]}" if end in self.side else slot)


def fix_articles(text: str) -> str:
    """`a old map` → `an old map`; `a one-act play` and `a university` stay."""
    return _ARTICLE.sub(lambda article: article[1] + "n", text)


def capitalize(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def name_once(text: str, name: str) -> str:
    """Keep the first full name in the text, and replace later ones with the surname."""
    head, full, tail = text.partition(name)
    return head + full + tail.replace(name, name.rpartition(" ")[2])


def split_sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


def recognizes(sentence: str, symbols: Sequence[str], side: str | None = None) -> bool:
    """True if the sentence can be derived from one of the symbols; with `side` ("positive", "negative"), on that
    side."""
    plain = re.sub(r"\b([Aa])n ", r"\1 ", sentence)
    if capitalize(fix_articles(plain)) != sentence:
        return False
    parser = _Parser(_parts(side), plain.lower())
    return any(len(plain) in parser.ends(symbol, 0) for symbol in symbols)


class _Parser:
    """A memoised parser of one text. `parts[symbol]` are alternatives, each of alternating literal text and symbols."""

    def __init__(self, parts: Mapping[str, Sequence[Sequence[str]]], text: str) -> None:
        self.parts, self.text = parts, text
        self.known: dict[tuple[str, int], frozenset[int]] = {}

    def ends(self, symbol: str, start: int) -> frozenset[int]:
        """All positions where a phrase derived from `symbol` can end if it starts at `start`."""
        if (symbol, start) not in self.known:
            found = (self._sequence_ends(parts, start) for parts in self.parts[symbol])
            self.known[symbol, start] = frozenset().union(*found)
        return self.known[symbol, start]

    def _sequence_ends(self, parts: Sequence[str], start: int) -> set[int]:
        ends = {start}
        for index, part in enumerate(parts):
            if index % 2:
                ends = {end for begin in ends for end in self.ends(part, begin)}
            else:
                ends = {end + len(part) for end in ends if self.text.startswith(part, end)}
        return ends


@cache
def _parts(side: str | None) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The grammar's alternatives, split into parts. With a side, `_pro` means its sentiment and `_con` the other one;
    without, both mean either."""
    sentiments = {"pro": ("good", "bad"), "con": ("good", "bad")}
    if side is not None:
        sentiments = {slot: (sentiment,) for slot, sentiment in SIDES[side].items()}
    return {
        symbol: tuple(tuple(_SLOT.split(entry.lower())) for entry in entries)
        for symbol, entries in _with_sentiments(sentiments).items()
    }


def _with_sentiments(sentiments: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The grammar with `pro` and `con` expanded to these sentiments, and people by surname or role as alternatives."""
    either: dict[str, tuple[str, ...]] = {}
    stems = [name.removesuffix("_good") for name in GRAMMAR if name.endswith("_good")]
    for slot, allowed in sentiments.items():
        either[slot] = tuple(f"{{{aspect}_{sentiment}}}" for aspect in ASPECTS for sentiment in allowed)
        either |= {f"{stem}_{slot}": tuple(f"{{{stem}_{sentiment}}}" for sentiment in allowed) for stem in stems}
    people = {
        "director": (*GRAMMAR["director"], "{last}", "the director"),
        "actor": (*GRAMMAR["actor"], "{last}", "the lead"),
    }
    return GRAMMAR | either | people
