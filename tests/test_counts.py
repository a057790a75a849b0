"""Numbers as messages tell them."""

from __future__ import annotations

import pytest

from trl.counts import counted, percent


def test_one_is_no_plural():
    assert [counted(n, "row") for n in (0, 1, 2714)] == ["0 rows", "1 row", "2,714 rows"]
    assert counted(2, "process") == "2 processes"


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [
        (2714, 2714, "100%"),
        (2702, 2714, ">99%"),
        (2700, 2714, "99%"),
        (1, 2, "50%"),
        (1, 1000, "<1%"),
        (0, 1000, "0%"),
        (0, 0, "0%"),
    ],
)
def test_all_and_nothing_are_not_rounded_to(part, whole, words):
    assert percent(part, whole) == words


def test_digits():
    assert [percent(n, 10_000, digits=1) for n in (9999, 9989, 1, 10_000)] == [">99.9%", "99.9%", "<0.1%", "100.0%"]
