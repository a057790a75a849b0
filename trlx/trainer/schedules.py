"""Learning-rate schedules of trlX configurations in trainers of `trl`."""

from __future__ import annotations

from typing import Any

import torch

from trl.trainers.base import BaseTrainer
from trlx.data.configs import SchedulerConfig
from trlx.trainer.options import make_scheduler


class Scheduled(BaseTrainer):
    """Trainer whose learning rate follows a `scheduler` section."""

    def __init__(self, *args: Any, scheduler: SchedulerConfig, **kwargs: Any) -> None:
        self.scheduler_section = scheduler
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = make_scheduler(
                self.scheduler_section, self.optimizer if optimizer is None else optimizer
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler
