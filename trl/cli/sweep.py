"""`trl sweep script.py --config sweep.yaml`: run a script with many settings, and compare the trials.

Trials run on Ray Tune if it is installed, else one after another in this process, with a message. The output folder has
`sweep.json` with all reported metrics, and `report.html` with a table and curves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trl.cli.parser import ParsedOptions, read_yaml
from trl.errors import ConfigError
from trl.imports import is_available
from trl.sweep.compare import best_of, print_table, write_page
from trl.sweep.plan import Plan
from trl.sweep.trial import Trial, main_of, tried

RESULTS = "sweep.json"


@dataclass
class SweepArguments:
    """Options of `trl sweep`."""

    config: str
    """YAML file with `tune_config`, and how to choose each parameter (`strategy` and `values`)."""

    output_dir: str = "sweep"
    """Folder for the results."""

    num_cpus: float = 4
    """CPUs per trial, with Ray."""

    num_gpus: float = 1
    """GPUs per trial, with Ray; ignored on machines without GPUs."""

    server_address: str | None = None
    """Address of a Ray cluster. None: Ray on this machine."""

    sequential: bool = False
    """Run trials one after another in this process, without Ray."""

    accelerate_config: str | None = None
    """Not available: a trial is one process. To train in several processes, run the script with `accelerate launch`."""

    def __post_init__(self) -> None:
        if self.accelerate_config is not None:
            raise ConfigError(
                "--accelerate_config is not available: a trial is one process. To train in several processes, run the "
                "script with `accelerate launch`."
            )


def run(given: SweepArguments, parsed: ParsedOptions) -> int:
    """Run a sweep. Return 1 if every trial failed, else 0. Raises ConfigError for mistakes in the options or the
    script."""
    if not parsed.rest:
        raise ConfigError(
            "The script is missing: a Python file with a function main(hparams). trl sweep SCRIPT.py --config SWEEP.yaml"
        )
    script = parsed.rest[0]
    plan = Plan.read(script, read_yaml(given.config, "--config"))
    main_of(plan.script)
    folder = Path(given.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if is_available("ray") and not given.sequential:
        from trl.sweep.ray_tune import run_on_ray

        trials = run_on_ray(plan, folder, cpus=given.num_cpus, gpus=given.num_gpus, address=given.server_address)
    else:
        trials = _one_by_one(plan, given)
    return _compare(plan, trials, folder)


def _one_by_one(plan: Plan, given: SweepArguments) -> list[Trial]:
    if given.server_address is not None:
        raise ConfigError('--server_address needs Ray: pip install "trl[sweep]", and leave --sequential out.')
    if plan.tuning.scheduler != "fifo":
        raise ConfigError(
            f"tune_config.scheduler={plan.tuning.scheduler!r} compares trials that run in parallel, which needs Ray: pip "
            'install "trl[sweep]", or use "fifo".'
        )
    why = "--sequential" if given.sequential else 'Ray is not installed (pip install "trl[sweep]")'
    print(f"{len(plan.trials)} trials, one after another in this process: {why}.", flush=True)
    return [tried(Trial(number, settings), plan.script) for number, settings in enumerate(plan.trials)]


def _compare(plan: Plan, trials: Sequence[Trial], folder: Path) -> int:
    content = {"metric": plan.tuning.metric, "mode": plan.tuning.mode, "trials": [asdict(trial) for trial in trials]}
    (folder / RESULTS).write_text(json.dumps(content, indent=1), encoding="utf-8")
    print_table(trials, plan.tuning)
    print(f"The report is in {write_page(trials, plan, folder)}.")
    ended = [trial for trial in trials if not trial.error]
    if ended and best_of(trials, plan.tuning) is None:
        found = ", ".join(sorted({name for trial in ended for name in trial.metrics})) or "nothing"
        raise ConfigError(f"No trial reported tune_config.metric={plan.tuning.metric!r}. Reported: {found}.")
    return 0 if ended else 1
