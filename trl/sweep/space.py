"""The search space of a sweep: a strategy and its values for each parameter.

    optimizer.kwargs.lr: {strategy: loguniform, values: [1e-5, 1e-3]}
    method.init_kl_coef: {strategy: grid, values: [0, 0.05]}

    uniform, loguniform      [low, high]                 lograndint, randint     [low, high), whole numbers
    quniform, qloguniform    [low, high, step]           qrandint, qlograndint   [low, high, step]
    randn                    [mean, deviation]           choice                  one of the values
    qrandn                   [mean, deviation, step]     grid                    each of the values

Drawn numbers depend only on the seed and the number of the trial. Each combination of a grid is run `num_samples`
times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from trl.errors import ConfigError, unknown

Numbers = np.random.RandomState
Draw = Callable[..., Any]
"""`draw(numbers, *values)`"""


def _loguniform(numbers: Numbers, low: float, high: float) -> float:
    return math.exp(numbers.uniform(math.log(low), math.log(high)))


def _stepped(draw: Draw) -> Draw:
    """A draw that is rounded to multiples of the last value, the step."""

    def stepped(numbers: Numbers, *values: float) -> float:
        *limits, step = values
        return type(step)(round(draw(numbers, *limits) / step) * step)

    return stepped


STRATEGIES: dict[str, tuple[Draw | None, int | None]] = {
    "uniform": (Numbers.uniform, 2),
    "quniform": (_stepped(Numbers.uniform), 3),
    "loguniform": (_loguniform, 2),
    "qloguniform": (_stepped(_loguniform), 3),
    "randn": (Numbers.normal, 2),
    "qrandn": (_stepped(Numbers.normal), 3),
    "randint": (Numbers.randint, 2),
    "qrandint": (_stepped(Numbers.uniform), 3),
    "lograndint": (lambda numbers, low, high: min(int(_loguniform(numbers, low, high)), high - 1), 2),
    "qlograndint": (_stepped(_loguniform), 3),
    "choice": (lambda numbers, *values: values[numbers.randint(len(values))], None),
    "grid": (None, None),
}
"""Strategy → the function that draws a value, and the number of `values` it takes (None: any number)."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a script, by its dotted name, and how its values are chosen."""

    name: str
    strategy: str
    values: Sequence[Any]

    @classmethod
    def read(cls, name: str, given: Any) -> Parameter:
        """Make a parameter from a mapping with `strategy` and `values`. Raises ConfigError for anything else."""
        if not isinstance(given, Mapping) or set(given) != {"strategy", "values"}:
            raise ConfigError(f"{name}: a parameter needs exactly the keys strategy and values, found {given!r:.80}.")
        strategy, values = given["strategy"], given["values"]
        if strategy not in STRATEGIES:
            raise ConfigError(unknown(f"strategy of {name}", str(strategy), STRATEGIES))
        count = STRATEGIES[strategy][1]
        if not isinstance(values, list) or not values or count not in (None, len(values)):
            wanted = "a list" if count is None else f"a list of {count} numbers"
            raise ConfigError(f"{name}: values of {strategy} must be {wanted}, found {values!r:.80}.")
        if count is not None and not all(isinstance(v, int | float) for v in values):
            raise ConfigError(f"{name}: values of {strategy} must be numbers, found {values!r:.80}.")
        if "log" in strategy and values[0] <= 0:
            raise ConfigError(f"{name}: the lower limit of {strategy} must be above zero, found {values[0]}.")
        return cls(name, strategy, values)

    def draw(self, numbers: Numbers) -> Any:
        """Draw a value."""
        return STRATEGIES[self.strategy][0](numbers, *self.values)


def trials_of(parameters: Sequence[Parameter], *, count: int, seed: int) -> list[dict[str, Any]]:
    """The settings of all trials: every combination of the grid `count` times, each time with new draws."""
    grids = [p for p in parameters if p.strategy == "grid"]
    drawn = [p for p in parameters if p.strategy != "grid"]
    trials = []
    for _ in range(count):
        for cell in product(*(p.values for p in grids)):
            numbers = Numbers((seed, len(trials)))
            found = {p.name: p.draw(numbers) for p in drawn}
            found |= {p.name: value for p, value in zip(grids, cell, strict=True)}
            trials.append({p.name: found[p.name] for p in parameters})
    return trials
