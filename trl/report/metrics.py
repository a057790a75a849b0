"""Turn rows of a log into curves: group metrics, match those of training and evaluation, and smooth them.

The values of a curve are put into at most BUCKETS buckets. The raw line shows the extremes of each bucket, so that no spike is
lost. The smoothed line is computed from the means m of the buckets, by local linear regression (Cleveland 1979):

    s_i = argmin_a min_b Σ_j exp(−(j−i)²/2σ²) · (m_j − a − b·(j−i))²,   σ = buckets / 40

Unlike a running mean, it does not lag behind, and is not biased at the ends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Point = tuple[float, float]

BUCKETS = 320
FEWEST = 24
"""Curves with fewer values are not smoothed."""

GROUPS: tuple[tuple[str, str], ...] = (
    (
        "Speed and size",
        r"runtime|per_second|step_time|num_tokens|padding_share|total_flos|num_input_tokens|^time/|memory",
    ),
    ("Completions", r"^completions?/"),
    ("Loss", r"(^|[/_])loss([/_]|$)|perplexity"),
    ("Rewards", r"reward|score|margin"),
    ("Divergence and exploration", r"(^|[/_])(approx)?(policy)?kl|entropy|ratio|clip|coef"),
    ("Accuracy", r"accurac"),
    ("Log-probabilities", r"logp|logit|logprobs"),
    ("Values and advantages", r"value|advantage|return|(^|/)val/|vpred"),
    ("Completions", r"completion|length|tokens/|terminated"),
    ("Optimisation", r"learning_rate|grad_norm|(^|[/_])lr$"),
)
"""Headings with the pattern of their metrics; a metric is put under the first that matches."""

ORDER = (
    "Rewards",
    "Loss",
    "Accuracy",
    "Divergence and exploration",
    "Values and advantages",
    "Log-probabilities",
    "Completions",
    "Optimisation",
    "Speed and size",
    "Other",
)
LEADING = ("loss", "reward", "rewards/accuracies", "accuracy", "mean_token_accuracy", "loss/value", "kl", "entropy")
LEADING += ("policy/entropy",)
"""Metrics that are listed first under their heading."""

HINTS: tuple[tuple[str, str], ...] = (
    (r"^loss$", "Should fall; for policy gradients it may hover around 0."),
    (r"mean_token_accuracy", "Should rise: how often the right token was the most likely one."),
    (r"rewards/margins?$|^margin$", "Should grow: how much better the chosen completion is rated."),
    (r"accurac", "Should rise above 0.5."),
    (r"^reward$|rewards?/.*mean$|mean_scores", "Should rise. Read samples, too: a reward can be gamed."),
    (r"reward_std|std_scores", "Should not reach 0: equal rewards teach nothing."),
    (r"frac_reward_zero_std", "Should stay below one half: groups with equal rewards teach nothing."),
    (r"approxkl|policykl", "How far one rollout batch moved the policy. Should stay small."),
    (r"(^|/)kl$", "Distance from the reference, in nats. Should not rise without end."),
    (r"kl_coef", "β, as it is adapted."),
    (r"entropy", "Should fall slowly. Near 0 all completions are alike."),
    (r"clipfrac|clip_ratio|clipped_share", "Should stay below 0.2."),
    (r"clipped_ratio", "Should stay near 0: completions that were cut at the limit."),
    (r"completions/.*length", "Should not grow without reason."),
    (r"loss/value|val/error", "Should fall once rewards have settled."),
    (r"grad_norm", "Should stay of one order. Spikes ask for a lower learning rate."),
    (r"learning_rate", "The schedule."),
    (r"logps/chosen", "Should not fall far."),
    (r"logps/rejected", "Should fall faster than that of the chosen."),
    (r"rewards/chosen", "Should stay above that of the rejected."),
    (r"rewards/rejected", "Should fall."),
    (r"tokens_per_second", "Real tokens, without padding."),
    (r"padding_share", "Should be near 0."),
)
"""Hints on how a metric should develop; the first pattern that matches is used."""

_EXACT = re.compile(r"learning_rate|lr$|coef|num_tokens|epoch|_steps$|(^|/)(min|max)_|count|pairs$")
"""Schedules, counts and extremes, which are not smoothed: a smoothed line would be misleading."""

_ONCE = re.compile(r"^(train_(runtime|loss|samples_per_second|steps_per_second)|total_flos)$")
"""Totals that are logged once, at the end, and are not drawn as curves."""

_TIMES = re.compile(r"(runtime|samples_per_second|steps_per_second|model_preparation_time)$")
"""Times of evaluations, which are not drawn as curves."""


@dataclass(frozen=True)
class Series:
    """One line: "train", "eval" or the name of an evaluation set. `lost` counts values that are not finite."""

    label: str
    points: tuple[Point, ...]
    lost: int = 0


@dataclass(frozen=True)
class Chart:
    """The curves of one metric, in training and in evaluation."""

    name: str
    series: tuple[Series, ...]

    @property
    def lost(self) -> int:
        return sum(each.lost for each in self.series)


def charts_by_group(log: Sequence[Mapping[str, object]]) -> dict[str, list[Chart]]:
    """The charts of a log by heading; headings and charts are in the order in which they are shown."""
    return grouped(charts_of(log))


def grouped(charts: Iterable[Chart]) -> dict[str, list[Chart]]:
    """Charts by heading; headings and charts are in the order in which they are shown."""
    found: dict[str, list[Chart]] = {}
    for chart in charts:
        found.setdefault(group_of(chart.name), []).append(chart)
    return {title: sorted(found[title], key=_rank) for title in ORDER if title in found}


def _rank(chart: Chart) -> tuple[int, str]:
    return (LEADING.index(chart.name) if chart.name in LEADING else len(LEADING), chart.name)


def group_of(name: str) -> str:
    return next((title for title, pattern in GROUPS if re.search(pattern, name)), "Other")


def hint(name: str) -> str:
    """A hint on how the metric should develop; empty if there is none."""
    return next((words for pattern, words in HINTS if re.search(pattern, name)), "")


def is_smoothed(name: str) -> bool:
    """True if a smoothed line is drawn for the metric."""
    return not _EXACT.search(name)


def charts_of_runs(runs: Mapping[str, Sequence[Mapping[str, object]]]) -> dict[str, list[Chart]]:
    """The charts of several logs by heading; each metric has a line for every run: `A`, `A (eval)`, `B`, …."""
    lines: dict[str, list[Series]] = {}
    for run, log in runs.items():
        for chart in charts_of(log):
            named = [replace(s, label=run if s.label == "train" else f"{run} ({s.label})") for s in chart.series]
            lines.setdefault(chart.name, []).extend(named)
    return grouped(Chart(name, tuple(series)) for name, series in lines.items())


def charts_of(log: Sequence[Mapping[str, object]]) -> list[Chart]:
    """One chart per metric. `eval_loss` is a line of the chart `loss`, and so is `eval_easy_loss`, labelled "easy"."""
    columns = _columns(log)
    trained = [name for name in columns if not name.startswith("eval_")]
    series: dict[str, list[Series]] = {name: [_series("train", columns[name])] for name in trained}
    for name in columns.keys() - set(trained):
        if not _TIMES.search(name):
            metric, label = _evaluated(name.removeprefix("eval_"), trained)
            series.setdefault(metric, []).append(_series(label, columns[name]))
    return [Chart(name, tuple(sorted(lines, key=_train_first))) for name, lines in series.items()]


def _train_first(series: Series) -> tuple[bool, str]:
    return series.label != "train", series.label


def _columns(log: Sequence[Mapping[str, object]]) -> dict[str, list[Point]]:
    columns: dict[str, list[Point]] = {}
    for row in log:
        step = row.get("step", 0)
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in ("step", "epoch") and not _ONCE.match(name):
                columns.setdefault(name, []).append((float(step), float(value)))
    return columns


def _evaluated(name: str, trained: Sequence[str]) -> tuple[str, str]:
    """The metric to which a metric of an evaluation belongs, and the name of the evaluation set."""
    if name in trained:
        return name, "eval"
    found = max((each for each in trained if name.endswith(f"_{each}")), key=len, default=None)
    return (name, "eval") if found is None else (found, name.removesuffix(f"_{found}"))


def _series(label: str, points: Sequence[Point]) -> Series:
    finite = tuple(sorted((point for point in points if math.isfinite(point[1])), key=lambda point: point[0]))
    return Series(label, finite, len(points) - len(finite))


def thinned(points: Sequence[Point]) -> list[Point]:
    """The points; of many, the lowest and the highest of each bucket, in their order."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept = []
    for bucket in _buckets(points):
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The smoothed line; empty if there are fewer than FEWEST points."""
    if len(points) < FEWEST:
        return []
    buckets = _buckets(points)
    steps = [sum(step for step, _ in bucket) / len(bucket) for bucket in buckets]
    means = [sum(value for _, value in bucket) / len(bucket) for bucket in buckets]
    sigma = max(len(means) / 40, 1.0)
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-((i / sigma) ** 2) / 2) for i in range(reach + 1)]
    return [(step, _fitted(means, i, weights)) for i, step in enumerate(steps)]


def _fitted(values: Sequence[float], centre: int, weights: Sequence[float]) -> float:
    """The value at `centre` of the weighted least-squares line through the values around it."""
    reach = len(weights) - 1
    near = range(max(0, centre - reach), min(len(values), centre + reach + 1))
    rows = [(weights[abs(j - centre)], j - centre, values[j]) for j in near]
    w, wx, wxx = (sum(weight * x**power for weight, x, _ in rows) for power in (0, 1, 2))
    wy, wxy = (sum(weight * x**power * y for weight, x, y in rows) for power in (0, 1))
    return (wxx * wy - wx * wxy) / (w * wxx - wx * wx)


def _buckets(points: Sequence[Point]) -> list[Sequence[Point]]:
    count = min(len(points), BUCKETS)
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    return [points[a:b] for a, b in pairwise(edges)]
