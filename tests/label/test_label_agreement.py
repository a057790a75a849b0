"""Agreement, worked by hand."""

from __future__ import annotations

import pytest

from trl.label.agreement import agreement, interval, nominal


def test_alpha_by_hand():
    # units (a, a), (b, b), (a, b): coincidences aa 2, bb 2, ab 1, ba 1; n_a = n_b = 3, n = 6.
    # D_o = 2/6, D_e = 2 · 3 · 3 / (6 · 5) = 18/30, α = 1 − (1/3) / (3/5) = 4/9
    found = agreement(["aa", "bb", "ab"])
    assert found.alpha == pytest.approx(4 / 9)
    assert found.share == pytest.approx(2 / 3)
    assert found.items == 3


def test_marks_that_are_near_agree_better_than_those_that_are_far():
    near, far = [(1, 2), (4, 5), (1, 1)], [(1, 5), (4, 1), (1, 1)]
    assert agreement(near, interval).alpha > 0.8 > 0.0 > agreement(far, interval).alpha
    # marks (1, 2), (4, 5): D_o = 1; pairs of 1, 2, 4, 5: 2 · (1 + 9 + 16 + 4 + 9 + 1) / 12 = 20/3; α = 1 − 3/20
    assert agreement([(1, 2), (4, 5)], interval).alpha == pytest.approx(0.85)


def test_an_item_of_three_answers_weighs_its_pairs_by_half():
    # aab: coincidences aa 1, ab 1, ba 1, and (b, b): bb 2; n_a = 2, n_b = 3; D_o = 2/5, D_e = 2 · 2 · 3 / 20
    assert agreement(["aab", "bb"]).alpha == pytest.approx(1 - (2 / 5) / (12 / 20))


def test_what_is_not_known():
    assert agreement(["a", "b", ""]) is None
    everyone = agreement(["aa", "aa"], nominal)
    assert (everyone.share, everyone.alpha) == (1.0, None)
