"""Launch a training command in several processes with accelerate's launcher: each process runs the same command.

    trl sft … --num_processes 4
    trl sft … --accelerate_config zero3 --num_processes 8
    trl sft … --accelerate_config two-nodes.yaml

With one process, training runs in the current process, without a launcher.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from trl.callbacks.signals import handled, handling
from trl.cli.parser import ParsedOptions
from trl.errors import ConfigError, suggest
from trl.imports import check_available
from trl.option_bounds import check_bounds

SHIPPED = Path(__file__).parent.parent / "accelerate_configs"

LAUNCHED = "TRL_LAUNCHED"
"""Environment variable of processes that a launcher started. `LOCAL_RANK` is not set by accelerate if there is only one."""

OLDER_NAMES = {"single_gpu": "single", "multi_gpu": "ddp"}


@dataclass
class LaunchArguments:
    """How a training command is launched."""

    num_processes: int | None = None
    """Number of training processes, one per device. None: the number in `accelerate_config`, or one."""

    accelerate_config: str | None = None
    """How to parallelise over devices: "single", "ddp", "fsdp2", "zero1", "zero2", "zero3", or a file made by
    `accelerate config`."""

    resume: bool = False
    """Resume from the newest intact checkpoint in `output_dir`; start from the beginning if there is none."""

    dry_run: bool = False
    """Check rows, plan and memory as `trl check` does, without training."""

    def __post_init__(self) -> None:
        check_bounds(self)
        self.accelerate_config = OLDER_NAMES.get(self.accelerate_config, self.accelerate_config)


def needs_launcher(given: ParsedOptions) -> bool:
    """True if training processes have to be launched: several, or those that `accelerate_config` describes.

    Raises ConfigError if `num_processes` contradicts `accelerate_config`.
    """
    arguments = given.arguments_for(LaunchArguments)
    count, config = arguments.num_processes or 1, arguments.accelerate_config
    if config == "single" and count > 1:
        raise ConfigError(
            f"accelerate_config='single' means one process, but num_processes={count}: leave one of them out."
        )
    if {"LOCAL_RANK", LAUNCHED} & os.environ.keys():  # this process was started by the launcher
        return False
    return count > 1 or config not in (None, "single")


def find_config(name: str) -> Path:
    """The path of a shipped accelerate configuration, or of the user's file. Raises ConfigError if it does not
    exist."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    path = shipped.get(name, Path(name).expanduser())
    if not path.is_file():
        raise ConfigError(
            f"accelerate_config={name!r} is neither a file nor one of {', '.join(shipped)}.{suggest(name, shipped)}"
        )
    return path


def launch(given: ParsedOptions, words: Sequence[str]) -> int:
    """Run `trl WORDS` in each of the requested processes. Return the exit status."""
    import torch

    arguments = given.arguments_for(LaunchArguments)
    name = arguments.accelerate_config or "ddp"
    config = find_config(name)
    os.environ.update(given.environment)
    devices = 0 if given.values.get("use_cpu", False) else torch.accelerator.device_count()
    check_devices(name, arguments.num_processes, devices)
    count = arguments.num_processes or (devices if config.parent == SHIPPED else None)
    processes = ["--num_processes", str(count)] if count else []
    with _signals_passed_on() as received, _marking_processes():
        failed = _run(["--config_file", str(config), *processes, "--module", "trl", *words])
    return 128 + received[0] if received else int(failed)


def check_devices(name: str, count: int | None, devices: int) -> None:
    """Raises ConfigError if a shipped configuration needs DeepSpeed, which is not installed, or more devices."""
    shipped = {path.stem for path in SHIPPED.glob("*.yaml")}
    if name.startswith("zero") and name in shipped:
        check_available("deepspeed", to=f"accelerate_config={name!r}")
    if devices and name in shipped and (count or 1) > devices:
        raise ConfigError(
            f"num_processes={count}, but this machine has {devices} devices: give at most {devices}, or use --use_cpu."
        )


def _run(words: Sequence[str]) -> bool:
    """Run accelerate's launcher. Return True if a process failed; that process prints its own error."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        arguments = launch_command_parser().parse_args(list(words))
        # torchrun requires at least one signal to handle: SIGURG never comes. `_signals_passed_on` handles the others.
        arguments.signals_to_handle = "SIGURG"
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"trl: error: process {rank} {_end(failure.exitcode)}.", file=sys.stderr)
        return True
    except subprocess.CalledProcessError:  # of the only process
        return True
    return False


def _end(status: int) -> str:
    """How a process ended, in words, by its exit status: a negative one is the signal that killed it."""
    if status >= 0:
        return f"ended with status {status}"
    why = ", which is how systems stop a process when memory runs out" if status == -9 else ""
    return f"was killed by signal {-status}{why}"


@contextmanager
def _marking_processes() -> Iterator[None]:
    """Set `LAUNCHED` in the environment of processes that are started meanwhile."""
    os.environ[LAUNCHED] = "1"
    try:
        yield
    finally:
        del os.environ[LAUNCHED]


@contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """Forward signals that end a run to the child processes, which save a checkpoint. Yields the list of received
    signals.

    torch's launcher would kill its processes after a few seconds.
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
