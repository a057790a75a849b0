"""From a log to curves, and from curves to drawings."""

from __future__ import annotations

import json
import math
import re
from html import unescape

import pytest

from trl.report.draw import describe, draw, frame_of, number, tick, ticks
from trl.report.metrics import BUCKETS, FEWEST, Chart, Series, charts_by_group, charts_of, group_of, smoothed, thinned

LOG = [
    {"step": 1, "epoch": 0.1, "loss": 4.0, "reward": 0.5, "learning_rate": 1e-3},
    {"step": 2, "epoch": 0.2, "loss": 2.0, "reward": float("nan"), "learning_rate": 5e-4},
    {"step": 2, "epoch": 0.2, "eval_loss": 3.0, "eval_easy_loss": 1.0, "eval_runtime": 9.0, "eval_bleu": 0.25},
    {"step": 2, "epoch": 0.2, "train_runtime": 60.0, "train_loss": 3.0, "total_flos": 1e9, "note": "text"},
]


def test_a_metric_of_training_and_evaluation_is_one_chart():
    charts = {chart.name: chart for chart in charts_of(LOG)}
    assert sorted(charts) == ["bleu", "learning_rate", "loss", "reward"]
    assert charts["loss"].series == (
        Series("train", ((1.0, 4.0), (2.0, 2.0))),
        Series("easy", ((2.0, 1.0),)),
        Series("eval", ((2.0, 3.0),)),
    )
    assert charts["bleu"].series == (Series("eval", ((2.0, 0.25),)),)


def test_what_is_no_number_is_counted_and_not_drawn():
    (reward,) = (chart for chart in charts_of(LOG) if chart.name == "reward")
    assert reward.series == (Series("train", ((1.0, 0.5),), lost=1),)
    assert reward.lost == 1
    assert draw(Chart("x", (Series("train", (), lost=3),))) == ""


def test_rewards_stand_before_the_loss():
    assert list(charts_by_group(LOG)) == ["Rewards", "Loss", "Optimisation", "Other"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss", "Loss"),
        ("ppo/loss/policy", "Loss"),
        ("rewards/accuracies", "Rewards"),
        ("objective/kl", "Divergence and exploration"),
        ("ppo/policy/approxkl", "Divergence and exploration"),
        ("completions/clipped_ratio", "Completions"),
        ("mean_token_accuracy", "Accuracy"),
        ("logps/chosen", "Log-probabilities"),
        ("ppo/val/error", "Values and advantages"),
        ("grad_norm", "Optimisation"),
        ("tokens_per_second", "Speed and size"),
        ("time/ppo/total", "Speed and size"),
        ("temperature", "Other"),
    ],
)
def test_headings(name, group):
    assert group_of(name) == group


def test_smoothing_keeps_straight_lines_to_the_ends():
    line = [(float(i), 3.0 - 0.5 * i) for i in range(5 * BUCKETS)]
    smooth = smoothed(line)
    assert len(smooth) == BUCKETS
    for step, value in smooth:
        assert value == pytest.approx(3.0 - 0.5 * step, abs=1e-6)


def test_smoothing_takes_noise_away():
    noisy = [(float(i), (-1.0) ** i) for i in range(200)]
    assert max(abs(value) for _, value in smoothed(noisy)) < 0.35
    assert max(abs(value) for _, value in smoothed(noisy)[20:-20]) < 1e-3
    assert smoothed(noisy[: FEWEST - 1]) == []


def test_thinning_keeps_every_spike_and_the_order():
    points = [(float(i), 0.0) for i in range(20_000)]
    points[7_777] = (7777.0, 5.0)
    points[12_345] = (12345.0, -5.0)
    thin = thinned(points)
    assert len(thin) <= 2 * BUCKETS
    assert (7777.0, 5.0) in thin
    assert (12345.0, -5.0) in thin
    assert [step for step, _ in thin] == sorted({step for step, _ in thin})
    assert thinned(points[:100]) == points[:100]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.14159, "3.142"),
        (-12345.6, "-12,346"),
        (1_500_000, "1.5M"),
        (7e9, "7G"),
        (0.0025, "0.0025"),
        (0.000025, "2.5e-05"),
        (math.nan, "nan"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_axes_have_room_for_six_characters():
    assert [tick(value) for value in (0.0, 9000.0, 12000.0, 100_000.0, -20_000.0, 2e6)] == [
        "0",
        "9,000",
        "12k",
        "100k",
        "-20k",
        "2M",
    ]


def test_ticks_are_round_and_inside():
    assert ticks(0, 10, most=5) == [0, 5, 10]
    assert ticks(-0.9, 1.1, most=5) == pytest.approx([-0.5, 0, 0.5, 1])
    assert ticks(1, 120, most=5) == [50, 100]
    for low, high in ((0.0013, 0.0019), (1e6, 7e6), (-3, 900)):
        assert 1 <= len(ticks(low, high, most=5)) <= 5
        assert all(low <= tick <= high for tick in ticks(low, high, most=5))


def test_the_first_step_stands_clear_of_the_word_before_it():
    svg = draw(Chart("loss", (Series("train", ((10.0, 1.0), (50.0, 2.0))),)))
    assert re.findall(r'text-anchor="(\w+)">(step|10|20|50)<', svg) == [
        ("end", "step"),
        ("start", "10"),
        ("middle", "20"),
        ("end", "50"),
    ]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e30])
def test_one_point_and_constants_have_a_frame(value):
    for points in ([(5.0, value)], [(1.0, value), (9.0, value)]):
        frame = frame_of(points)
        assert frame.values[0] < value < frame.values[1]
        assert frame.steps[0] < frame.steps[1]


def test_a_drawing_spans_its_frame_and_tells_its_numbers():
    chart = Chart("loss", (Series("train", ((0.0, 1.0), (10.0, 2.0))), Series("eval", ((10.0, 1.5),))))
    svg = draw(chart)
    assert describe(chart) in unescape(svg)
    assert describe(chart) == "loss: train from 1 at step 0 to 2 at step 10; eval from 1.5 at step 10 to 1.5 at step 10"
    start, end = re.search(r'class="line-0 whole" d="M([\d.]+) [\d.]+L([\d.]+) ', svg).groups()
    assert (float(start), float(end)) == (54, 386)
    data = json.loads(unescape(re.search(r'data-chart="(.*?)"', svg).group(1)))
    assert data["series"][1] == {"label": "eval", "points": [[386.0, 10.0, "1.5"]]}


def test_many_points_get_a_smooth_line():
    svg = draw(Chart("loss", (Series("train", tuple((float(i), float(i % 7)) for i in range(1000))),)))
    assert 'class="line-0 raw"' in svg
    assert 'class="line-0 smooth"' in svg
    assert "<circle" not in svg
