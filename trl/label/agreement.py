"""Agreement between raters: Krippendorff's α.

    α = 1 − D_o / D_e

D_o is the mean disagreement δ² of two answers to the same item, D_e that of any two answers. α is 1 for full agreement
and 0 for chance agreement. Each pair within an item of m answers has weight 1 / (m − 1); items with a single answer do
not count. Krippendorff, "Computing Krippendorff's alpha-reliability", 2011.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

Distance = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Agreement:
    """items   number of items with answers of two or more people
    share   share of equal pairs, among pairs of answers to the same item
    alpha   Krippendorff's α; None if all answers are equal, so that D_e = 0
    """

    items: int
    share: float
    alpha: float | None


def nominal(a: Hashable, b: Hashable) -> float:
    """δ² for categories: 1 if they differ, else 0."""
    return float(a != b)


def interval(a: float, b: float) -> float:
    """δ² for marks on a scale: the squared difference."""
    return float((a - b) ** 2)


def agreement(items: Iterable[Sequence[Hashable]], distance: Distance = nominal) -> Agreement | None:
    """Agreement of the answers to each item; None if no item has two answers."""
    several = [answers for answers in items if len(answers) > 1]
    if not several:
        return None
    coincidences: Counter[tuple[Hashable, Hashable]] = Counter()
    for answers in several:
        for pair in permutations(answers, 2):
            coincidences[pair] += 1 / (len(answers) - 1)
    counts: Counter[Hashable] = Counter()
    for (first, _), weight in coincidences.items():
        counts[first] += weight
    total = sum(counts.values())
    observed = sum(weight * distance(*pair) for pair, weight in coincidences.items()) / total
    expected = sum(counts[a] * counts[b] * distance(a, b) for a in counts for b in counts) / (total * (total - 1))
    equal = sum(weight for (a, b), weight in coincidences.items() if a == b) / total
    return Agreement(len(several), equal, 1 - observed / expected if expected else None)
