"""Several processes, by accelerate's launcher: this command, entered again in each of them.

    trl sft … --num_processes 4
    trl sft … --accelerate_config zero3 --num_processes 8
    trl sft … --accelerate_config two-nodes.yaml

One process needs no launcher, and runs where it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from trl.callbacks.signals import handled, handling
from trl.cli.parser import ParsedOptions
from trl.errors import ConfigError, suggest
from trl.option_bounds import check_bounds

SHIPPED = Path(__file__).parent.parent / "accelerate_configs"

OLDER_NAMES = {"single_gpu": "single", "multi_gpu": "ddp"}


@dataclass
class LaunchArguments:
    """How a training command is run."""

    num_processes: int | None = None
    """Processes to train in, one for each device. None: as `accelerate_config` says, or one."""

    accelerate_config: str | None = None
    """How devices work together: "single", "ddp", "fsdp2", "zero1", "zero2", "zero3", or a file of `accelerate config`."""

    resume: bool = False
    """Go on from the newest good checkpoint in `output_dir`; start from the beginning if there is none."""

    dry_run: bool = False
    """Check rows, plan and memory, as `trl check` does, and train nothing."""

    def __post_init__(self) -> None:
        check_bounds(self)
        self.accelerate_config = OLDER_NAMES.get(self.accelerate_config, self.accelerate_config)


def needs_launcher(given: ParsedOptions) -> bool:
    """Whether processes have to be started: several, or as a configuration describes them.

    Raises ConfigError for a number that the configuration does not start.
    """
    arguments = given.arguments_for(LaunchArguments)
    count, config = arguments.num_processes or 1, arguments.accelerate_config
    if config == "single" and count > 1:
        raise ConfigError(
            f"accelerate_config='single' is one process, and num_processes={count}: leave one of them out."
        )
    if "LOCAL_RANK" in os.environ:  # this is one of the processes
        return False
    return count > 1 or config not in (None, "single")


def find_config(name: str) -> Path:
    """The file of a shipped configuration, or of the user's own. Raises ConfigError where there is none."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    path = shipped.get(name, Path(name).expanduser())
    if not path.is_file():
        raise ConfigError(
            f"accelerate_config={name!r} is neither a file nor one of {', '.join(shipped)}.{suggest(name, shipped)}"
        )
    return path


def launch(given: ParsedOptions, words: Sequence[str]) -> int:
    """Run `trl WORDS` in each of the processes that were asked for. Returns the exit status."""
    import torch

    arguments = given.arguments_for(LaunchArguments)
    name = arguments.accelerate_config or "ddp"
    config = find_config(name)
    os.environ.update(given.environment)
    devices = 0 if given.values.get("use_cpu", False) else torch.accelerator.device_count()
    check_devices(name, arguments.num_processes, devices)
    count = arguments.num_processes or (devices if config.parent == SHIPPED else None)
    processes = ["--num_processes", str(count)] if count else []
    with _signals_passed_on() as received:
        failed = _run(["--config_file", str(config), *processes, "--module", "trl", *words])
    return 128 + received[0] if received else int(failed)


def check_devices(name: str, count: int | None, devices: int) -> None:
    """Raises ConfigError where a shipped configuration wants other or more devices than there are."""
    shipped = {path.stem for path in SHIPPED.glob("*.yaml")}
    if name.startswith("zero") and name in shipped and find_spec("deepspeed") is None:
        raise ConfigError(f"accelerate_config={name!r} needs DeepSpeed: pip install 'trl[deepspeed]'.")
    if devices and name in shipped and (count or 1) > devices:
        raise ConfigError(
            f"num_processes={count}, and there are {devices} devices here: give {devices} at most, or use --use_cpu."
        )


def _run(words: Sequence[str]) -> bool:
    """Run accelerate's launcher; True if a process failed, which has said why itself."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        arguments = launch_command_parser().parse_args(list(words))
        # An option of torchrun, which has to be a signal that never comes: all others are passed on.
        arguments.signals_to_handle = "SIGURG"
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"trl: error: process {rank} ended with status {failure.exitcode}.", file=sys.stderr)
        return True
    return False


@contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """Hand the signals that end a run to the processes below this one, which end with a checkpoint; gives those received.

    torch's launcher would give its processes a few seconds to end, and then kill them.
    """
    import psutil

    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    with handling(dict.fromkeys(handled(), pass_on)):
        yield received
