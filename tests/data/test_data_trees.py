"""Rows cut to length and written as columns, by hand."""

from __future__ import annotations

import pytest

from trl.data.trees import Tree, keep_end, keep_prompt_end, keep_sides, keep_start

TREE = Tree(
    prompt=[1, 2, 3],
    completions=[[4, 5, 6, 7], [8]],
    masks=[[True, False, True, True], [True]],
    signals={"score": [[0.4, 0.5, 0.6, 0.7], [0.8]]},
)
WHOLE = Tree([1, 2, 3], [[4, 5, 6, 7], []])


def parts(tree):
    return tree.prompt, tree.completions


def test_counts():
    assert (TREE.tokens, TREE.longest) == (8, 4)
    assert Tree([1], []).longest == 0
    assert TREE.all_masks is TREE.masks
    assert WHOLE.all_masks == [[True] * 4, []]


@pytest.mark.parametrize(
    ("unpredicted", "marked", "unmarked"), [(0, [3, 1], [4, 0]), (1, [2, 0], [3, 0]), (2, [2, 0], [2, 0])]
)
def test_tokens_that_nothing_predicts_are_not_trained_on(unpredicted, marked, unmarked):
    assert TREE.trained(unpredicted=unpredicted) == marked
    assert WHOLE.trained(unpredicted=unpredicted) == unmarked


def test_masks_and_signals_are_cut_with_their_tokens():
    cut = TREE.sliced(slice(1, None), [slice(2), slice(0)])
    assert cut == Tree([2, 3], [[4, 5], []], [[True, False], []], {"score": [[0.4, 0.5], []]})


@pytest.mark.parametrize(
    ("length", "start", "end"),
    [
        (7, ([1, 2, 3], [[4, 5, 6, 7], [8]]), ([1, 2, 3], [[4, 5, 6, 7], [8]])),
        (6, ([1, 2, 3], [[4, 5, 6], [8]]), ([2, 3], [[4, 5, 6, 7], [8]])),
        (4, ([1, 2, 3], [[4], [8]]), ([], [[4, 5, 6, 7], [8]])),
        (3, ([1, 2, 3], [[], []]), ([], [[5, 6, 7], [8]])),
        (2, ([1, 2], [[], []]), ([], [[6, 7], [8]])),
    ],
)
def test_cuts_of_prompt_and_completions_together(length, start, end):
    assert parts(keep_start(TREE, length)) == start
    assert parts(keep_end(TREE, length)) == end


def test_cuts_of_prompts_alone():
    assert [keep_prompt_end(TREE, n).prompt for n in (1, 2, 3, 9)] == [[3], [2, 3], [1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(
    ("prompt", "length", "mode", "expected"),
    [
        (2, 3, "keep_start", ([1, 2], [[4, 5, 6], [8]])),
        (2, 3, "keep_end", ([2, 3], [[4, 5, 6], [8]])),
        (9, None, "keep_end", ([1, 2, 3], [[4, 5, 6, 7], [8]])),
        (None, 1, "keep_end", ([1, 2, 3], [[4], [8]])),
    ],
)
def test_cuts_of_either_side(prompt, length, mode, expected):
    assert parts(keep_sides(TREE, prompt, length, mode)) == expected
