"""The configuration of a sweep: the parameters to search, the metric that judges trials, and the search options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trl.errors import ConfigError, suggest, unknown
from trl.sweep.space import Parameter, trials_of

MODES = ("max", "min")
SEARCHES = ("random", "bayesopt", "bohb")
SCHEDULERS = ("fifo", "hyperband", "hyperbandforbohb")


@dataclass(frozen=True)
class Tuning:
    """The section `tune_config` of a sweep's file."""

    metric: str
    """Name of the reported metric that judges trials: "reward/mean", "metrics/optimality", …"""

    mode: str = "max"
    """"max": a higher metric is better. "min": a lower one."""

    search_alg: str = "random"
    """"random": settings of every trial are drawn independently."""

    scheduler: str = "fifo"
    """"fifo": every trial runs to its end. "hyperband" (with Ray): stop trials early that are worse than others after
    the same number of reports."""

    num_samples: int = 1
    """Number of random draws. Every combination of `grid` parameters is tried this many times."""

    max_concurrent_trials: int | None = None
    """Maximum number of parallel trials, with Ray. None: as many as the cluster has resources for."""

    seed: int = 0
    """Random seed of the draws."""

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("search_alg", SEARCHES), ("scheduler", SCHEDULERS)):
            if getattr(self, name) not in known:
                raise ConfigError(unknown(f"tune_config.{name}", str(getattr(self, name)), known))
        if self.search_alg != "random":
            raise ConfigError(f"tune_config.search_alg={self.search_alg!r} is not available: use 'random'.")
        if self.scheduler == "hyperbandforbohb":
            raise ConfigError(
                "tune_config.scheduler='hyperbandforbohb' goes with bohb, which is not available: use 'hyperband'."
            )
        if self.num_samples < 1:
            raise ConfigError(f"tune_config.num_samples={self.num_samples}: give at least 1.")


@dataclass(frozen=True)
class Plan:
    """A script with `main(hparams)`, and the settings of all its trials."""

    script: Path
    tuning: Tuning
    trials: list[dict[str, Any]]

    @classmethod
    def read(cls, script: str, config: Mapping[str, Any]) -> Plan:
        """Make a plan from the content of a sweep's file. Raises ConfigError for missing or unknown keys."""
        file = Path(script).expanduser()
        if not file.is_file():
            raise ConfigError(f"There is no script {script!r}.")
        if not isinstance(config.get("tune_config"), Mapping):
            raise ConfigError("The sweep's file has no section tune_config: add one, with at least a metric.")
        known = {field.name: field for field in fields(Tuning)}
        for name in config["tune_config"]:
            if name not in known:
                raise ConfigError(
                    f"tune_config has no option {name!r}.{suggest(name, known)} It has: {', '.join(known)}."
                )
        if "metric" not in config["tune_config"]:
            raise ConfigError("tune_config.metric is missing: name the reported metric that judges trials.")
        tuning = Tuning(**config["tune_config"])
        parameters = [Parameter.read(name, given) for name, given in config.items() if name != "tune_config"]
        if not parameters:
            raise ConfigError(
                "The sweep's file has no parameters: add one, such as optimizer.kwargs.lr: {strategy: …, values: […]}."
            )
        return cls(file.resolve(), tuning, trials_of(parameters, count=tuning.num_samples, seed=tuning.seed))
