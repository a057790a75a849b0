"""Options shared by all trainers that sample from the model, texts or pictures, and train on rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trl.algorithms.advantages import RewardAggregation
from trl.errors import ConfigError
from trl.trainers.option_effects import ignore


@dataclass(kw_only=True)
class RolloutOptions:
    """Sizes of rollout batches, and how their rewards are combined."""

    shuffle_dataset: bool = True
    """Take prompts in random order, a new one in each epoch."""

    num_generations: int = 8
    """Samples (completions, pictures) of each prompt."""

    steps_per_generation: int | None = None
    """Number of minibatches, of per_device_train_batch_size samples each, in a rollout batch. None:
    gradient_accumulation_steps, so that every rollout batch is one optimizer step."""

    num_iterations: int = 1
    """Number of epochs over each rollout batch."""

    reward_weights: list[float] | None = None
    """Weight of each reward function in the sum. None: 1 each."""

    multi_objective_aggregation: RewardAggregation = "sum_then_normalize"
    """Sum the rewards of all functions, then normalise ("sum_then_normalize"); or normalise those of each function within
    the group first ("normalize_then_sum", GDPO, arXiv:2601.05242)."""

    reward_timeout: float | None = None
    """Seconds that a call of a reward function may take; with a limit, it runs in a separate process. None: no limit."""

    SAMPLES: ClassVar[str] = "completions"
    """The word for samples in error messages."""

    SPLITS: ClassVar[str] = "max_tokens_per_micro_batch"
    """The option that splits minibatches."""

    @property
    def minibatches_per_rollout_batch(self) -> int:
        """Number of minibatches in a rollout batch, on each process."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def prompts_per_rollout_batch(self) -> int:
        """Prompts of a rollout batch, on each process. A group stays whole on one process."""
        return self.per_device_train_batch_size * self.minibatches_per_rollout_batch // self.num_generations

    def check_batches(self) -> None:
        """Raise ConfigError if a rollout batch does not consist of whole groups."""
        samples = self.per_device_train_batch_size * self.minibatches_per_rollout_batch
        if samples % self.num_generations:
            raise ConfigError(
                f"A rollout batch has {samples} {self.SAMPLES} per process (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} × steps_per_generation={self.minibatches_per_rollout_batch}), which is no "
                f"multiple of num_generations={self.num_generations}: change one of the three."
            )

    def refuse_options_of_rows(self) -> None:
        """Ignore or refuse options of the data loader of rows, of which there is none. Raises ConfigError."""
        reason = f"minibatches are parts of a rollout batch, which {self.SPLITS} splits if memory is short."
        ignore(self, "auto_find_batch_size", False, reason)
        if self.train_sampling_strategy != "random":
            raise ConfigError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} has no effect on prompts: leave it out. They are "
                "drawn in random order, or in the dataset's order with shuffle_dataset=False."
            )

    def check_groups(self) -> None:
        """Translate True and False of `scale_rewards` to names. Raises ConfigError for groups of fewer than 2 samples."""
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        if self.num_generations < 2:
            raise ConfigError(f"num_generations={self.num_generations}: a group needs at least 2 {self.SAMPLES}.")

    @property
    def is_on_policy(self) -> bool:
        """Whether every rollout batch is trained on once, in the optimizer step for which it was sampled."""
        return self.num_iterations == 1 and self.gradient_accumulation_steps % self.minibatches_per_rollout_batch == 0
