"""Encoded rows, and their truncation to maximum lengths.

A row is a tree of token ids: one prompt and its K completions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

KEPT, IDENTICAL, UNSCORED, OVERLONG = 0, 1, 2, 3
"""Status of a row: kept; dropped because its completions are equal; dropped because no token is left to train on; dropped
because its images, which must not be cut, exceed the maximum length."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A row during encoding.

    `masks[k][t]` is True if token t of completion k is trained on; None: all tokens are. `signals[name][k][t]` is a number
    per token.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]] | None = None
    signals: Mapping[str, list[list[float]]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens, with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        """Number of tokens of the longest completion."""
        return max(map(len, self.completions), default=0)

    @property
    def all_masks(self) -> list[list[bool]]:
        """The masks; all True if `masks` is None."""
        return [[True] * len(ids) for ids in self.completions] if self.masks is None else self.masks

    def trained(self, *, unpredicted: int) -> list[int]:
        """Number of trained tokens of each completion, without its first `unpredicted` tokens, which nothing predicts."""
        if self.masks is None:
            return [max(0, len(ids) - unpredicted) for ids in self.completions]
        return [sum(mask[unpredicted:]) for mask in self.masks]

    def sliced(self, prompt: slice, completions: Sequence[slice]) -> Tree:
        """The tree with its prompt, and each completion with its mask and signals, reduced to slices."""

        def cut(lists: Sequence[list[Any]]) -> list[list[Any]]:
            return [values[part] for values, part in zip(lists, completions, strict=True)]

        return replace(
            self,
            prompt=self.prompt[prompt],
            completions=cut(self.completions),
            masks=None if self.masks is None else cut(self.masks),
            signals={name: cut(values) for name, values in self.signals.items()},
        )


def without(tree: Tree, tokens: Collection[int]) -> Tree:
    """The tree with a mask of its completions that leaves out `tokens`."""
    return replace(tree, masks=[[token not in tokens for token in ids] for ids in tree.completions])


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
    """Cut the ends of completions, but neither the prompt nor the first `whole` tokens; None if that is not enough."""
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
    """Cut the beginning of the prompt, and keep its end, which the completions answer."""
    return replace(tree, prompt=tree.prompt[max(0, len(tree.prompt) - max_prompt_length) :])


def keep_sides(tree: Tree, max_prompt_length: int | None, max_length: int | None, mode: str) -> Tree:
    """For encoder-decoders: cut prompt and completions to separate limits."""
    cut = (lambda n: slice(n)) if mode == "keep_start" else (lambda n: slice(-n, None))
    whole = slice(None)
    ends = slice(max_length) if max_length is not None else whole
    return tree.sliced(whole if max_prompt_length is None else cut(max_prompt_length), [ends] * len(tree.completions))


def with_token_signal(tree: Tree, name: str, values: Sequence[float]) -> Tree:
    """Add a signal with one number per trained token to a tree with one completion; other tokens get 0.

    If one number is missing, the last trained token gets 0. Raises ValueError, which says how many numbers are needed, for
    any other number of values.
    """
    (mask,) = tree.all_masks
    trained = sum(mask)
    if len(values) not in (trained, trained - 1):
        raise ValueError(
            f"{len(values)} numbers for {trained} trained tokens: give one for each (that of the last, EOS, may be missing)"
        )
    each = iter([*map(float, values), 0.0])
    return replace(tree, signals={**tree.signals, name: [[next(each) if trains else 0.0 for trains in mask]]})


def shared_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the common beginning, limited such that each side has at least one element left after it."""
    last = max(0, min(len(chosen), len(rejected)) - 1)
    return next((i for i in range(last) if chosen[i] != rejected[i]), last)


def fork(chosen: list[int], rejected: list[int]) -> Tree:
    """Two sequences as a tree: the prompt is their common beginning, limited such that each completion has a token."""
    shared = shared_length(chosen, rejected)
    return Tree(chosen[:shared], [chosen[shared:], rejected[shared:]])
