"""Statistics of PPO's steps in the trackers of `accelerate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from trl.errors import ConfigError
from trl.trainers.ppo.config import PPOConfig


def start_trackers(args: PPOConfig, accelerator: Accelerator) -> None:
    """Start the tracker that `log_with` names. Raises ConfigError if it is not installed."""
    if args.log_with is None:
        return
    accelerator.project_configuration = ProjectConfiguration(**{"project_dir": args.output_dir, **args.project_kwargs})
    accelerator.log_with = filter_trackers(args.log_with, accelerator.logging_dir)
    if not accelerator.log_with and args.log_with != "all":
        raise ConfigError(
            f"log_with={args.log_with!r}, but that tracker is not installed: install it, or leave log_with out."
        )
    options = {k: v for k, v in args.to_dict().items() if isinstance(v, bool | int | float | str)}
    accelerator.init_trackers(args.tracker_project_name, config=options, init_kwargs=args.tracker_kwargs)


def log_table(
    accelerator: Accelerator,
    batch: Mapping[str, Sequence],
    columns: Sequence[str],
    rewards: Sequence[Tensor | float],
    step: int,
) -> None:
    """The texts of a batch beside their rewards, as a table where the tracker has them."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            found = [*(batch[column] for column in columns), [float(reward) for reward in rewards]]
            rows = [list(row) for row in zip(*found, strict=True)]
            tracker.log_table("game_log", columns=[*columns, "reward"], data=rows, step=step)
