"""Run benchmarks of lm-evaluation-harness, with its tasks, prompts and metrics, on a model that is already loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.errors import ConfigError, unknown
from trl.evaluation.statistics import Estimate, Z
from trl.imports import require

NEEDED_BY = "A benchmark by name"
STDERR = "_stderr"


def run_benchmarks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    batch_size: int,
    limit: int | None = None,
    tasks_folder: str | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Run the tasks `names`; return every metric of every task, by "task metric". An empty list gives an empty dict.

    tasks_folder   folder with YAML files of further tasks
    chat           ask the questions with the tokenizer's chat template
    limit          maximum number of questions per task

    Raises ConfigError for an unknown task, MissingPackageError without lm-eval.
    """
    if not names:
        return {}
    lm_eval = require("lm_eval", to=NEEDED_BY)
    huggingface, tasks = require("lm_eval.models.huggingface", to=NEEDED_BY), require("lm_eval.tasks", to=NEEDED_BY)
    manager = tasks.TaskManager(include_path=tasks_folder)
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(unknown("benchmark", name, manager.all_tasks))
    found = lm_eval.simple_evaluate(
        model=huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        log_samples=False,
    )
    return estimates(found["results"], found["n-samples"])


def estimates(results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, Mapping[str, int]]) -> dict[str, Estimate]:
    """Convert results of the harness, {task: {"acc,none": 0.5, "acc_stderr,none": 0.1, …}}, to estimates by "task
    metric".

    `counts` has the number of questions per task. The part after the comma is the filter that was applied to the
    answers; the name of the metric includes it, unless it is "none".
    """
    told: dict[str, Estimate] = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith(STDERR) or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}{STDERR},{chosen}")
            width = Z * stderr if isinstance(stderr, int | float) else 0.0
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            told[f"{task} {shown}"] = Estimate(float(value), width, counts.get(task, {}).get("effective", 0))
    return told
