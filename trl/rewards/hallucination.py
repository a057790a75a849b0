"""Object hallucination, as rewards and as tables of metrics: yes-or-no questions (POPE), and captions (CHAIR).

POPE     "Is there a dog in the image?"  yes | no                            arXiv:2305.10355
         precision = TP / (TP + FP),   recall = TP / (TP + FN),   F1 = 2 · precision · recall / (precision + recall)

CHAIR_i  named objects that are not in the image / named objects             arXiv:1809.02156, Eq. 1
CHAIR_s  captions that name such an object / captions
recall   objects of the image that are named / objects of the image
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from trl.errors import DataError
from trl.rewards.answers import Completion, text_of

Completions = Sequence[Completion]


def says_yes(answer: str) -> bool:
    """True if an answer means yes: its first sentence has neither "no" nor "not", as in POPE's own evaluation."""
    first = re.split(r"[.!?\n]", answer.strip(), maxsplit=1)[0].lower()
    return not set(re.findall(r"[a-z]+", first.replace("n't", " not"))) & {"no", "not"}


def _is_yes(label: Any, place: int) -> bool:
    if isinstance(label, bool):
        return label
    if str(label).strip().lower() not in ("yes", "no"):
        raise DataError(f"label[{place}] is {label!r}: give 'yes' or 'no', the answers of POPE.")
    return str(label).strip().lower() == "yes"


def pope_reward(completions: Completions, label: Sequence[str | bool | None], **_: Any) -> list[float | None]:
    """1 if the answer to a yes-or-no question equals the column `label` ("yes" or "no"), else 0.

    Rows with the label None belong to other tasks, and get no reward. Raises DataError for another label.
    """
    rows = zip(completions, label, strict=True)
    return [
        None if truth is None else float(says_yes(text_of(answer)) == _is_yes(truth, i))
        for i, (answer, truth) in enumerate(rows)
    ]


class _Table:
    """Metrics that print as a table."""

    def as_dict(self) -> dict[str, float]:
        """The metrics by name."""
        return asdict(self)

    def __str__(self) -> str:
        names, values = zip(*self.as_dict().items(), strict=True)
        shown = [f"{value:.3f}" for value in values]
        widths = [max(len(name), len(value)) for name, value in zip(names, shown, strict=True)]
        lines = (names, shown)
        return "\n".join("  ".join(f"{x:>{w}}" for x, w in zip(line, widths, strict=True)) for line in lines)


@dataclass(frozen=True)
class PopeScores(_Table):
    """Accuracy, precision and recall of "yes", F1, and the share of "yes" among all answers."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float


def pope_scores(answers: Completions, labels: Sequence[str | bool]) -> PopeScores:
    """POPE's metrics for answers to yes-or-no questions. Ratios with the denominator zero are 0.

    Raises DataError for no answers, or a label that is neither "yes" nor "no".
    """
    if not len(answers):
        raise DataError("There are no answers to score.")
    said = [says_yes(text_of(answer)) for answer in answers]
    truth = [_is_yes(label, i) for i, label in enumerate(labels)]
    hits = sum(s and t for s, t in zip(said, truth, strict=True))
    precision, recall = _share(hits, sum(said)), _share(hits, sum(truth))
    right = sum(s == t for s, t in zip(said, truth, strict=True))
    f1 = _share(2 * precision * recall, precision + recall)
    return PopeScores(right / len(said), precision, recall, f1, sum(said) / len(said))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class ChairScores(_Table):
    """CHAIR per object and per caption, recall of the images' objects, and the mean number of words of a caption."""

    chair_i: float
    chair_s: float
    recall: float
    words: float


@dataclass(frozen=True)
class ObjectNames:
    """Names of objects: synonyms by object, besides its own name. Plurals in -s and -es are recognised."""

    synonyms: Mapping[str, Collection[str]]

    @classmethod
    def of(cls, names: Collection[str] | Mapping[str, Collection[str]]) -> ObjectNames:
        """From a collection of names, or from a mapping of names to synonyms."""
        return cls(dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, ()))

    @cached_property
    def _object_of(self) -> dict[str, str]:
        return {name.lower(): thing for thing, others in self.synonyms.items() for name in (thing, *others)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(map(re.escape, self._object_of), key=len, reverse=True)
        return re.compile(rf"\b({'|'.join(longest_first) or '(?!)'})(?:e?s)?\b", re.IGNORECASE)

    def named_in(self, text: str) -> set[str]:
        """The objects that a text names."""
        return {self._object_of[match[1].lower()] for match in self._pattern.finditer(text)}


def chair_scores(
    captions: Completions,
    objects: Sequence[Collection[str]],
    names: Collection[str] | Mapping[str, Collection[str]],
) -> ChairScores:
    """CHAIR of captions of images that contain `objects`; `names` are all objects to look for, with synonyms.

    Raises DataError for no captions.
    """
    if not len(captions):
        raise DataError("There are no captions to score.")
    known, texts = ObjectNames.of(names), [text_of(caption) for caption in captions]
    named = [known.named_in(text) for text in texts]
    there = [set(own) for own in objects]
    wrong = [len(said - own) for said, own in zip(named, there, strict=True)]
    found = sum(len(said & own) for said, own in zip(named, there, strict=True))
    words = sum(len(text.split()) for text in texts) / len(texts)
    return ChairScores(
        chair_i=_share(sum(wrong), sum(map(len, named))),
        chair_s=sum(count > 0 for count in wrong) / len(texts),
        recall=_share(found, sum(map(len, there))),
        words=words,
    )


class ChairReward:
    """The reward recall_weight · recall − CHAIR_i of a caption, where a column lists the objects of the image.

    names           all objects to look for: their names, or synonyms by name
    column          the column that lists the objects of an image
    recall_weight   reward for naming objects of the image; at 0, an empty caption would get the highest reward
    """

    def __init__(
        self,
        names: Collection[str] | Mapping[str, Collection[str]],
        *,
        column: str = "objects",
        recall_weight: float = 1.0,
    ) -> None:
        self.names, self.column, self.recall_weight = names, column, recall_weight
        self.__name__ = "chair"

    def __call__(self, completions: Completions, **columns: Any) -> list[float | None]:
        """One reward per completion, None if the column is None. Raises DataError if rows do not have the column."""
        if self.column not in columns:
            raise DataError(
                f"CHAIR needs a column {self.column!r} with the objects of each image, but the columns are {sorted(columns)}."
            )
        rows = zip(completions, columns[self.column], strict=True)
        return [None if own is None else self._reward(caption, own) for caption, own in rows]

    def _reward(self, caption: Completion, objects: Collection[str]) -> float:
        scores = chair_scores([caption], [objects], self.names)
        return self.recall_weight * scores.recall - scores.chair_i
