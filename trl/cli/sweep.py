"""`trl sweep --config sweep.yml script.py`: run the trials, and compare them.

On Ray Tune where it is installed; else one after the other in this process, which is said. Results are in the folder of the
sweep: `sweep.json` has all that was reported, `report.html` the table and the curves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trl.cli.fields import Option, options_in_source
from trl.cli.parser import OptionParser, read_yaml
from trl.errors import ConfigError, suggest
from trl.imports import is_available
from trl.sweep.compare import best_of, print_table, write_page
from trl.sweep.numbers import with_numbers
from trl.sweep.plan import Plan
from trl.sweep.trial import Trial, main_of, tried

RESULTS = "sweep.json"
SUMMARY = "Run the function main(hparams) of a script with many settings, and compare what the runs report."
USAGE = "trl sweep SCRIPT.py --config SWEEP.yaml"


@dataclass
class SweepArguments:
    """Options of the command."""

    config: str
    """YAML file with `tune_config`, and a strategy for each parameter."""

    output_dir: str = "sweep"
    """Folder of the results."""

    num_cpus: float = 4
    """Processors of a trial, with Ray."""

    num_gpus: float = 1
    """GPUs of a trial, with Ray, where there are any."""

    server_address: str | None = None
    """Address of a Ray cluster. None: Ray on this machine."""

    sequential: bool = False
    """Run one trial after the other in this process, without Ray."""


OPTIONS = f"{__name__}:SweepArguments"
REFUSED = {"--accelerate_config": "a trial is one process. For a run on several, `accelerate launch` the script."}
"""Options of other sweeps that cannot be kept."""
NEEDLESS = ("-y", "--yes")
"""Options of other sweeps that answer a question which is not asked here."""


def run(words: Sequence[str], command: str = "trl sweep") -> int:
    """Run a sweep; the exit status is 1 if every trial has failed. Raises ConfigError for what cannot be run."""
    options = options_in_source(OPTIONS)
    parsed = OptionParser(options).parse([word for word in words if word not in NEEDLESS], keep_rest=True)
    if parsed.help:
        _print_help(command, options)
        return 0
    script, given = _script(parsed.rest, options), parsed.arguments_for(SweepArguments)
    plan = Plan.read(script, with_numbers(read_yaml(given.config, "--config")))
    main_of(plan.script)
    folder = Path(given.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if is_available("ray") and not given.sequential:
        from trl.sweep.ray_tune import run_on_ray

        trials = run_on_ray(plan, folder, cpus=given.num_cpus, gpus=given.num_gpus, address=given.server_address)
    else:
        trials = _one_by_one(plan, given)
    return _compare(plan, trials, folder)


def _script(rest: Sequence[str], options: Sequence[Option]) -> str:
    """The script among the words that are no options of the command. Raises ConfigError for any other word."""
    for word in rest:
        if word in REFUSED:
            raise ConfigError(f"{word}: {REFUSED[word]}")
        if word.startswith("-"):
            raise ConfigError(f"Unknown option {word}.{suggest(word, [f'--{option.name}' for option in options])}")
    if not rest:
        raise ConfigError(f"The script is missing: a Python file with a function main(hparams). {USAGE}")
    if len(rest) > 1:
        raise ConfigError(f"Unexpected {rest[1]!r}: a sweep has one script, and it is {rest[0]!r}.")
    return rest[0]


def _print_help(command: str, options: Sequence[Option]) -> None:
    from trl.cli.help import print_options

    examples = [f"{command} rates.py --config sweep.yaml", f"{command} rates.py --config sweep.yaml --sequential"]
    print_options(f"{command} SCRIPT.py", SUMMARY, options, everything=True, examples=examples, reads_files=False)


def _one_by_one(plan: Plan, given: SweepArguments) -> list[Trial]:
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
