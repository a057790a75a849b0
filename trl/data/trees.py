"""Encoded rows, cut to length.

A row is a tree: one prompt and the K completions that hang from it, all of them token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

KEPT, IDENTICAL, UNSCORED, OVERLONG = 0, 1, 2, 3
"""What became of a row: kept; dropped because its completions are equal; dropped with no token left to train on; dropped
because what must not be cut of it, its images, is longer than it may be."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A row on its way through encoding.

    `masks[k][t]` is True where token t of completion k is trained on; None trains on all. `signals[name][k][t]` is a
    number per token.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]] | None = None
    signals: Mapping[str, list[list[float]]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        """Tokens of the longest completion."""
        return max(map(len, self.completions), default=0)

    @property
    def all_masks(self) -> list[list[bool]]:
        """The masks, written out where all tokens are trained on."""
        return [[True] * len(ids) for ids in self.completions] if self.masks is None else self.masks

    def trained(self, *, unpredicted: int) -> list[int]:
        """Trained tokens of each completion. The first `unpredicted` tokens have nothing before them to predict them."""
        if self.masks is None:
            return [max(0, len(ids) - unpredicted) for ids in self.completions]
        return [sum(mask[unpredicted:]) for mask in self.masks]

    def sliced(self, prompt: slice, completions: Sequence[slice]) -> Tree:
        """The tree with its prompt and each completion cut."""

        def cut(lists: Sequence[list[Any]]) -> list[list[Any]]:
            return [values[part] for values, part in zip(lists, completions, strict=True)]

        return replace(
            self,
            prompt=self.prompt[prompt],
            completions=cut(self.completions),
            masks=None if self.masks is None else cut(self.masks),
            signals={name: cut(values) for name, values in self.signals.items()},
        )


def keep_start(tree: Tree, max_length: int) -> Tree:
    """Cut the ends of the completions, so that prompt and completion have at most `max_length` tokens."""
    if len(tree.prompt) + tree.longest <= max_length:
        return tree
    room = max(0, max_length - len(tree.prompt))
    return tree.sliced(slice(max_length), [slice(room)] * len(tree.completions))


def keep_end(tree: Tree, max_length: int) -> Tree:
    """Cut the beginning of the prompt, by what the longest completion needs; then that of completions too long alone."""
    excess = len(tree.prompt) + tree.longest - max_length
    if excess <= 0:
        return tree
    return tree.sliced(slice(excess, None), [slice(max(0, len(c) - max_length), None) for c in tree.completions])


def keep_whole(tree: Tree, whole: int, max_prompt_length: int | None, max_length: int | None) -> Tree | None:
    """Cut completions alone, behind the first `whole` tokens of prompt and completion; None where that is not enough.

    A prompt stays as it is.
    """
    prompt = len(tree.prompt)
    if max_prompt_length is not None and prompt > max_prompt_length:
        return None
    if max_length is None or prompt + tree.longest <= max_length:
        return tree
    if max(whole, prompt + bool(prompt)) > max_length:
        return None
    return tree.sliced(slice(None), [slice(max_length - prompt)] * len(tree.completions))


TRUNCATIONS = {"keep_start": keep_start, "keep_end": keep_end}


def keep_prompt_end(tree: Tree, max_prompt_length: int) -> Tree:
    """Cut the beginning of the prompt: its end is what the completions answer."""
    return replace(tree, prompt=tree.prompt[max(0, len(tree.prompt) - max_prompt_length) :])


def keep_sides(tree: Tree, max_prompt_length: int | None, max_length: int | None, mode: str) -> Tree:
    """Cut what an encoder and a decoder read each on its own."""
    cut = (lambda n: slice(n)) if mode == "keep_start" else (lambda n: slice(-n, None))
    whole = slice(None)
    ends = slice(max_length) if max_length is not None else whole
    return tree.sliced(whole if max_prompt_length is None else cut(max_prompt_length), [ends] * len(tree.completions))


def with_token_signal(tree: Tree, name: str, values: Sequence[float]) -> Tree:
    """The tree of one completion with a number for each trained token: zero for others, and for the last if one is missing.

    Raises ValueError, saying how many there should be, for another number of values.
    """
    (mask,) = tree.all_masks
    trained = sum(mask)
    if len(values) not in (trained, trained - 1):
        raise ValueError(
            f"{len(values)} numbers for {trained} tokens that are trained on, the last of which ends the text"
        )
    each = iter([*map(float, values), 0.0])
    return replace(tree, signals={**tree.signals, name: [[next(each) if trains else 0.0 for trains in mask]]})


def shared_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the common beginning, one short of a side that is a beginning of the other."""
    last = max(0, min(len(chosen), len(rejected)) - 1)
    return next((i for i in range(last) if chosen[i] != rejected[i]), last)


def fork(chosen: list[int], rejected: list[int]) -> Tree:
    """Two sequences as a tree: their common beginning is the prompt, one short of the shorter sequence at most."""
    shared = shared_length(chosen, rejected)
    return Tree(chosen[:shared], [chosen[shared:], rejected[shared:]])
