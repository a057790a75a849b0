"""From a log to curves, and from curves to drawings."""

from __future__ import annotations

import json
import math

import pytest

from trl.report.charts import as_script, chart_data, describe, number
from trl.report.metrics import (
    BUCKETS,
    FEWEST,
    Chart,
    Series,
    charts_by_group,
    charts_of,
    charts_of_runs,
    group_of,
    hint,
    is_smoothed,
    smoothed,
    thinned,
)

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


# ---- what is drawn ----


def test_lines_stand_over_common_steps():
    chart = Chart("loss", (Series("train", ((1.0, 4.0), (2.0, 2.0))), Series("eval", ((2.0, 3.0), (4.0, 1.0)))))
    assert chart_data(chart) == {
        "name": "loss",
        "steps": [1.0, 2.0, 4.0],
        "lines": [
            {"label": "train", "smooth": False, "values": [4.0, 2.0, None]},
            {"label": "eval", "smooth": False, "values": [None, 3.0, 1.0]},
        ],
    }
    assert describe(chart).startswith(
        "loss: train from 4 at step 1 to 2 at step 2; eval from 3 at step 2 to 1 at step 4."
    )


def test_smooth_lines_are_told_apart_and_not_drawn_through_schedules():
    points = tuple((float(i), float(i % 7)) for i in range(100))
    lines = [(each["label"], each["smooth"]) for each in chart_data(Chart("loss", (Series("train", points),)))["lines"]]
    assert lines == [("train", False), ("train", True)]
    assert len(chart_data(Chart("learning_rate", (Series("train", points),)))["lines"]) == 1
    assert [is_smoothed(name) for name in ("reward", "num_tokens", "kl_coef", "completions/max_length")] == [
        True,
        False,
        False,
        False,
    ]


def test_a_long_log_stays_small():
    points = tuple((float(i), math.sin(i)) for i in range(100_000))
    data = chart_data(Chart("loss", (Series("train", points),)))
    assert len(data["steps"]) <= 3 * BUCKETS
    assert max(abs(value) for value in data["lines"][0]["values"] if value is not None) > 0.999


def test_what_is_sent_to_the_script_cannot_end_it():
    script = as_script([Chart("</script><b>", (Series("train", ((1.0, 2.0),)),))])
    assert "<" not in script
    assert json.loads(script)[0]["name"] == "</script><b>"


def test_what_a_metric_should_do():
    assert hint("rewards/accuracies") == "Should rise above 0.5."
    assert hint("objective/kl").startswith("Distance from the reference")
    assert hint("something") == ""


def test_runs_side_by_side():
    logs = {"a": [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}], "b": [{"step": 3, "loss": 1.0}]}
    (chart,) = charts_of_runs(logs)["Loss"]
    assert [(series.label, series.points) for series in chart.series] == [
        ("a", ((1.0, 2.0),)),
        ("a (eval)", ((1.0, 2.5),)),
        ("b", ((3.0, 1.0),)),
    ]
