"""Attributes that scripts for other releases read from a `PPOTrainer`.

trainer.kl_ctl.value              β, the coefficient of the KL penalty
trainer.kl_ctl.value = 0.1        sets β from now on; the adaptive controller goes on from there
trainer.kl_ctl.update(kl, n)      what `step` does: β after n responses with this mean KL
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from trl.algorithms.ppo import PPO
from trl.models.score import unwrap
from trl.trainers.attributes import Fact


class KLControl:
    """The KL controller of a PPO algorithm, which `algorithm` returns. `target` and `horizon` are options of `PPOConfig`."""

    __slots__ = ("_algorithm",)

    def __init__(self, algorithm: Callable[[], PPO]) -> None:
        self._algorithm = algorithm

    @property
    def value(self) -> float:
        """β, the coefficient of the KL penalty."""
        return self._algorithm().controller.coefficient

    @value.setter
    def value(self, value: float) -> None:
        algorithm = self._algorithm()
        algorithm.controller = replace(algorithm.controller, coefficient=float(value))

    def update(self, current: float, n_steps: int) -> None:
        """Update β by the mean KL of `n_steps` responses, in nats. `step` does this by itself."""
        algorithm = self._algorithm()
        algorithm.controller = algorithm.controller.updated(float(current), n_steps)


class PPOAttributes:
    """Attributes of `PPOTrainer`, by their names in other releases."""

    accelerator: Accelerator
    algorithm: PPO
    model: Any

    @Fact()
    def current_device(self) -> torch.device:
        return self.accelerator.device

    @Fact()
    def is_encoder_decoder(self) -> bool:
        return unwrap(self.model).config.is_encoder_decoder

    @Fact()
    def is_peft_model(self) -> bool:
        """Whether the model has adapters."""
        return self.model.is_peft_model

    @Fact(" Set `kl_ctl.value`, or `adap_kl_ctrl`, `init_kl_coef`, `target` and `horizon` of PPOConfig.")
    def kl_ctl(self) -> KLControl:
        """The coefficient of the KL penalty, to be read and set."""
        return KLControl(lambda: self.algorithm)
