"""Trackers of `accelerate`, for the trainers with the classic interface, which log statistics and tables to them directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from trl.errors import ConfigError


class Tracked(Protocol):
    """The options of a classic trainer that configure its tracker."""

    output_dir: str
    log_with: Any
    project_kwargs: Any
    tracker_kwargs: Any
    tracker_project_name: str

    def to_dict(self) -> dict[str, Any]: ...


class NoTracker(GeneralTracker):
    """Ignores all logs; hooks of scripts may log pictures and tables to it."""

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        pass

    log_table = log_images


def start_tracker(config: Tracked, accelerator: Accelerator) -> GeneralTracker:
    """Start the tracker that `log_with` names, or return one that ignores all logs if `log_with` is None.

    Raises ConfigError if the tracker is not installed.
    """
    if config.log_with is None:
        return NoTracker(_blank=True)
    accelerator.project_configuration = ProjectConfiguration(
        **{"project_dir": config.output_dir, **config.project_kwargs}
    )
    accelerator.log_with = filter_trackers(config.log_with, accelerator.logging_dir)
    if not accelerator.log_with and config.log_with != "all":
        raise ConfigError(
            f"log_with={config.log_with!r}, but that tracker is not installed: install it, or leave log_with out."
        )
    options = {k: v for k, v in config.to_dict().items() if isinstance(v, bool | int | float | str)}
    accelerator.init_trackers(config.tracker_project_name, config=options, init_kwargs=config.tracker_kwargs)
    return next(iter(accelerator.trackers), NoTracker(_blank=True))


def log_table(
    accelerator: Accelerator,
    batch: Mapping[str, Sequence],
    columns: Sequence[str],
    rewards: Sequence[Tensor | float],
    step: int,
) -> None:
    """Log the texts of a batch and their rewards as a table, to trackers that support tables (wandb)."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            texts = [batch[column] for column in columns]
            found = [*texts, [float(reward) for reward in rewards]] if all(map(len, texts)) else []
            rows = [list(row) for row in zip(*found, strict=True)]
            tracker.log_table("game_log", columns=[*columns, "reward"], data=rows, step=step)
