"""Attributes that scripts for other releases read from an online trainer: its options by name, and its reward functions.

trainer.num_generations      trainer.args.num_generations
trainer.reward_weights       a tensor, [functions]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl.errors import ConfigError
from trl.rewards.model import RewardModel
from trl.rewards.reward import Reward


class Option:
    """An option of the configuration. Setting it on the trainer raises ConfigError, since it would change nothing."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return self if trainer is None else getattr(trainer.args, self.name)

    def __set__(self, trainer: Any, value: Any) -> None:
        raise ConfigError(
            f"{type(trainer).__name__}.{self.name} cannot be set: it is read from the configuration when the trainer is "
            f"constructed. Set {self.name}={value!r} in {type(trainer.args).__name__}."
        )


class OnlineAttributes:
    """Attributes of online trainers. Reading one whose option the configuration lacks raises AttributeError."""

    args: Any
    rewards: Sequence[Reward]

    beta = Option()
    importance_sampling_level = Option()
    log_completions = Option()
    loss_type = Option()
    mask_truncated_completions = Option()
    max_completion_length = Option()
    min_p = Option()
    num_completions_to_print = Option()
    num_generations = Option()
    num_iterations = Option()
    repetition_penalty = Option()
    scale_rewards = Option()
    shuffle_dataset = Option()
    temperature = Option()
    top_k = Option()
    top_p = Option()
    use_vllm = Option()
    vllm_mode = Option()

    @property
    def num_generations_eval(self) -> int:
        """Completions of each prompt in an evaluation."""
        return self.args.num_generations_eval or self.num_generations

    @property
    def reward_funcs(self) -> list[Callable | nn.Module]:
        """The reward functions, and reward models as `nn.Module`s."""
        functions = [reward.function for reward in self.rewards]
        return [each.model if isinstance(each, RewardModel) else each for each in functions]

    @property
    def reward_func_names(self) -> list[str]:
        """Names of the reward functions in logs."""
        return [reward.name for reward in self.rewards]

    @property
    def reward_weights(self) -> Tensor:
        """Weight of each reward function in the sum, `[functions]`."""
        return torch.tensor([reward.weight for reward in self.rewards])
