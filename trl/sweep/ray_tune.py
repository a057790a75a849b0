"""Run trials on Ray Tune: in parallel, on all machines of a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trl.imports import require
from trl.sweep.plan import Plan, Tuning
from trl.sweep.trial import Trial, run_trial

REPORTED = "_reported"
"""Key that holds all reports of a trial in Ray's results. Ray would read slashes in metric names as nesting."""


def run_on_ray(plan: Plan, folder: Path, *, cpus: float, gpus: float, address: str | None = None) -> list[Trial]:
    """Run all trials of the plan, with `cpus` and `gpus` per trial, or as many as the cluster has, if fewer."""
    ray = require("ray", to="A sweep on several machines")
    from ray import tune

    ray.init(address=address, ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    there = ray.cluster_resources()
    resources = {"cpu": min(cpus, there.get("CPU", 1)), "gpu": min(gpus, there.get("GPU", 0))}
    trainable = tune.with_resources(_trainable(plan), resources)
    tuner = tune.Tuner(
        trainable,
        param_space={"number": tune.grid_search(list(range(len(plan.trials))))},
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(plan.tuning), max_concurrent_trials=plan.tuning.max_concurrent_trials
        ),
        run_config=tune.RunConfig(storage_path=str(folder.resolve()), name="ray", verbose=0),
    )
    try:
        results = tuner.fit()
    finally:
        ray.shutdown()
    return sorted((_trial(plan, result) for result in results), key=lambda trial: trial.number)


def _trainable(plan: Plan) -> Any:
    script, trials, metric, folder = plan.script, plan.trials, plan.tuning.metric, os.getcwd()

    def trainable(config: dict[str, Any]) -> None:
        from ray import tune

        os.chdir(folder)
        heard: list[dict[str, float]] = []

        def hear(metrics: dict[str, float]) -> None:
            heard.append(metrics)
            judged = {"metric": metrics[metric]} if metric in metrics else {}
            tune.report({REPORTED: list(heard), **judged})

        run_trial(script, trials[config["number"]], hear)

    return trainable


def _scheduler(tuning: Tuning) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    return FIFOScheduler() if tuning.scheduler == "fifo" else ASHAScheduler(metric="metric", mode=tuning.mode)


def _trial(plan: Plan, result: Any) -> Trial:
    number = result.config["number"]
    metrics = result.metrics or {}
    error = "" if result.error is None else str(result.error).strip().splitlines()[-1]
    seconds = metrics.get("time_total_s", 0.0)
    return Trial(number, plan.trials[number], list(metrics.get(REPORTED, ())), error, seconds)
