"""`trl sweep --config sweep.yml script.py`: run the trials, and compare them.

On Ray Tune where it is installed; else one after the other in this process, which is said. Results are in the folder of the
sweep: `sweep.json` has all that was reported, `report.html` the table and the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trl.cli.parser import read_yaml
from trl.errors import ConfigError
from trl.imports import is_available
from trl.sweep.compare import best_of, print_table, write_page
from trl.sweep.numbers import with_numbers
from trl.sweep.plan import Plan
from trl.sweep.trial import Trial, main_of, tried

RESULTS = "sweep.json"


def parser(command: str = "trl sweep") -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        command, description="Run a script with many settings, and compare what they report."
    )
    made.add_argument("script", help="Python file with a function main(hparams)")
    made.add_argument("--config", required=True, help="YAML file with tune_config, and a strategy for each parameter")
    made.add_argument("--output_dir", default="sweep", help="folder of the results (default: sweep)")
    made.add_argument("--num_cpus", type=float, default=4, help="processors of a trial, with Ray (default: 4)")
    made.add_argument(
        "--num_gpus", type=float, default=1, help="GPUs of a trial, with Ray (default: 1, where there are any)"
    )
    made.add_argument("--server_address", help="address of a Ray cluster")
    made.add_argument("--sequential", action="store_true", help="one trial after the other, without Ray")
    made.add_argument("--accelerate_config", help="refused: a trial is one process")
    made.add_argument("-y", action="store_true", help="taken for granted: nothing is asked")
    return made


def run(words: Sequence[str], command: str = "trl sweep") -> int:
    """Run a sweep; the exit status is 1 if every trial has failed. Raises ConfigError for what cannot be run."""
    given = parser(command).parse_args(list(words))
    if given.accelerate_config:
        raise ConfigError(
            "--accelerate_config: a trial is one process. For a run on several, `accelerate launch` the script."
        )
    plan = Plan.read(given.script, with_numbers(read_yaml(given.config, "--config")))
    main_of(plan.script)
    folder = Path(given.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if is_available("ray") and not given.sequential:
        from trl.sweep.ray_tune import run_on_ray

        trials = run_on_ray(plan, folder, cpus=given.num_cpus, gpus=given.num_gpus, address=given.server_address)
    else:
        trials = _one_by_one(plan, given)
    return _compare(plan, trials, folder)


def _one_by_one(plan: Plan, given: argparse.Namespace) -> list[Trial]:
    if given.server_address is not None:
        raise ConfigError('--server_address is for Ray: pip install "trl[sweep]", and leave --sequential out.')
    if plan.tuning.scheduler != "fifo":
        raise ConfigError(
            f"tune_config.scheduler={plan.tuning.scheduler!r} stops trials that run at the same time, which takes Ray: pip "
            'install "trl[sweep]", or use "fifo".'
        )
    why = "as asked for" if given.sequential else 'Ray is not installed (pip install "trl[sweep]")'
    print(f"{len(plan.trials)} trials, one after the other in this process: {why}.", flush=True)
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
