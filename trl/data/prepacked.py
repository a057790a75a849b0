"""Rows that are already packed in the dataset: a column says where each of their documents begins.

    seq_lengths                           the lengths of the documents
    position_ids                          positions that start again at 0 with each document
    document_ids, sequence_ids, seq_idx   a number for each token, the same within a document
    attention_mask                        such numbers from 1 on; 0 is padding

Each document is then treated as a sequence of its own: attention does not cross its borders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from trl.data.trees import Tree
from trl.errors import DataError

if TYPE_CHECKING:
    from trl.data.columns import Columns

NUMBERED = ("document_ids", "sequence_ids", "seq_idx")
PACKED_COLUMNS = ("seq_lengths", "position_ids", *NUMBERED)
"""Columns that say where the documents of an encoded row begin."""

REFUSED = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Columns that say where documents begin in forms that are not supported."""


def comes_packed(columns: Iterable[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
    """True if pre-tokenised rows are packed; for `attention_mask`, this is judged by its values in the first rows.

    Raises DataError for a column that describes packed rows in an unsupported form.
    """
    columns = set(columns)
    if unread := sorted(columns & set(REFUSED)):
        raise DataError(
            f"Column {unread[0]!r} says where the documents of a packed row begin, but is not supported: give the lengths of the "
            "documents in a column 'seq_lengths'."
        )
    if columns & set(PACKED_COLUMNS):
        return True
    masks = (row.get("attention_mask") for row in first_rows) if "attention_mask" in columns else ()
    return any(isinstance(mask, list) and any(isinstance(n, int) and n > 1 for n in mask) for mask in masks)


def refuse_packed(columns: Iterable[str], kind: str) -> None:
    """Raise DataError if a column describes packed rows for a row kind that cannot be packed."""
    if found := sorted(set(columns) & {*PACKED_COLUMNS, *REFUSED}):
        raise DataError(
            f"Column {found[0]!r} says where the documents of a packed row begin, but rows of the kind {kind} hold one "
            "example each. Unpack them, or remove the column."
        )


def documents_of(trees: list[Tree], columns: Columns) -> tuple[list[Tree], list[list[int]]]:
    """The rows with the first token of each document masked, since nothing predicts it, and the lengths of the documents.

    Raises DataError if a column is invalid, or two columns disagree.
    """
    lengths = [_lengths(k, tree, columns) for k, tree in enumerate(trees)]
    return [_masked_starts(tree, each) for tree, each in zip(trees, lengths, strict=True)], lengths


def _lengths(k: int, tree: Tree, columns: Columns) -> list[int]:
    """The lengths of the documents of row k, whose tokens `tree` holds without padding."""
    kept = [t for t, n in enumerate(columns["attention_mask"][k]) if n] if "attention_mask" in columns else None
    found: dict[str, list[int]] = {}
    for name, read in READERS.items():
        if name in columns:
            values = columns.numbers(name)[k]
            if name != "seq_lengths" and kept is not None and len(values) == len(columns["attention_mask"][k]):
                values = [values[t] for t in kept]
            found[name] = read(values, lambda message, name=name: columns.error(k, name, message))
            if sum(found[name]) != tree.tokens:
                raise columns.error(
                    k, name, f"its documents have {sum(found[name])} tokens together, but the row has {tree.tokens}."
                )
    if len(found.get("attention_mask", ())) == 1 < len(found):
        found.pop("attention_mask")  # it only marks padding, and another column describes the documents
    (name, lengths), *others = found.items()
    for other, theirs in others:
        if theirs != lengths:
            raise columns.error(k, other, f"its documents have {theirs} tokens, but those of {name!r} have {lengths}.")
    return lengths


Refuse = Callable[[str], DataError]


def _from_lengths(values: Sequence[int], refuse: Refuse) -> list[int]:
    if not values or min(values) < 1:
        raise refuse(f"every document has at least one token, found {list(values)}.")
    return list(values)


def _from_positions(values: Sequence[int], refuse: Refuse) -> list[int]:
    starts = [t for t, position in enumerate(values) if position == 0]
    expected = -1
    for t, position in enumerate(values):
        expected = 0 if position == 0 else expected + 1
        if position != expected or not starts or starts[0]:
            raise refuse(
                f"position id {position} of token {t + 1}: they have to count up by one, and restart at 0 with each document."
            )
    return [end - start for start, end in zip(starts, [*starts[1:], len(values)], strict=True)]


def _from_numbers(values: Sequence[int], refuse: Refuse) -> list[int]:
    runs = [(number, len(list(run))) for number, run in groupby(values)]
    numbers = [number for number, _ in runs]
    twice = next((number for i, number in enumerate(numbers) if number in numbers[:i]), None)
    if twice is not None:
        raise refuse(f"document {twice} is interrupted by another: the tokens of a document have to be contiguous.")
    return [length for _, length in runs]


READERS: dict[str, Callable[[Sequence[int], Refuse], list[int]]] = {
    "seq_lengths": _from_lengths,
    "position_ids": _from_positions,
    **dict.fromkeys(NUMBERED, _from_numbers),
    "attention_mask": _from_numbers,
}
"""Column → the function that computes the lengths of documents from its values."""


def _masked_starts(tree: Tree, lengths: Sequence[int]) -> Tree:
    mask = list(tree.masks[0]) if tree.masks else [True] * tree.tokens
    for start in accumulate(lengths[:-1], initial=0):
        mask[start] = False
    return replace(tree, masks=[mask])
