"""DDPO on a dataset of prompts, with the reward functions of the other online trainers; `trl ddpo` runs it.

    A = clip((r − mean r) / std r, ±c)     over the rollout batch, or over earlier rewards of the same prompt
    loss = −min(ρ_t A, clip(ρ_t, 1 ± ε) A)                                     see `trl.algorithms.ddpo`

`DDPOTrainer` has the classic interface, with functions for prompts and rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from trl.algorithms.ddpo import DDPO, PromptStatistics
from trl.diffusion.rollouts import PictureRollouts
from trl.trainers.diffusion.grpo import StepPolicyConfig, StepPolicyTrainer
from trl.training.collectives import all_gather_object
from trl.types import Experience


@dataclass
class DiffusionDDPOConfig(StepPolicyConfig):
    """Options of `DiffusionDDPOTrainer`."""

    num_inference_steps: int = 50
    """Denoising steps of the pictures sampled for training."""

    num_inference_steps_eval: int = 50

    guidance_scale: float = 5.0

    num_generations: int = 1
    """Pictures of each prompt; 1 suffices, since rewards are normalised over the whole batch."""

    noise_level: float = 1.0

    epsilon: float = 1e-4
    """Clip the ratio of a denoising step to 1 ± this."""

    per_prompt_stat_tracking: bool = False
    """Normalise rewards by mean and standard deviation of earlier ones of the same prompt, not of the rollout batch."""

    per_prompt_stat_tracking_buffer_size: int = 16
    """Number of rewards to remember for each prompt."""

    per_prompt_stat_tracking_min_count: int = 16
    """Number of rewards of a prompt from which its own statistics are used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_algorithm()

    def make_algorithm(self) -> DDPO:
        return DDPO(clip_range=self.epsilon, advantage_clip=self.advantage_clip)

    def make_statistics(self) -> PromptStatistics | None:
        """The buffer of each prompt's rewards, with per_prompt_stat_tracking=True."""
        sizes = (self.per_prompt_stat_tracking_buffer_size, self.per_prompt_stat_tracking_min_count)
        return PromptStatistics(*sizes) if self.per_prompt_stat_tracking else None


class DiffusionDDPOTrainer(StepPolicyTrainer):
    """Raise the probability of the denoising steps that led to pictures rewarded above the batch's mean.

    Arguments: see `DiffusionRolloutTrainer`.
    """

    config_class = DiffusionDDPOConfig

    def prepare(self) -> None:
        super().prepare()
        self.statistics_of_prompts = self.args.make_statistics()
        if self.statistics_of_prompts is not None:
            self.states.register("prompt_statistics", self.statistics_of_prompts)

    def experience(self, batch: PictureRollouts) -> Experience:
        found = super().experience(batch)
        if self.statistics_of_prompts is None:
            return found
        return found.with_signals(**prompt_moments(self.statistics_of_prompts, batch, self.accelerator))


def prompt_moments(statistics: PromptStatistics, batch: PictureRollouts, accelerator: Accelerator) -> dict[str, Tensor]:
    """The signals `prompt_mean` and `prompt_std` `[N]` of this process, from the rewards of all processes."""
    everywhere = all_gather_object((batch.prompts, batch.rewards), accelerator)
    prompts = [prompt for part, _ in everywhere for prompt in part]
    mean, std = statistics.update(prompts, torch.cat([rewards for _, rewards in everywhere]))
    start = sum(len(part) for part, _ in everywhere[: accelerator.process_index])
    own = slice(start, start + len(batch.prompts))
    return {"prompt_mean": mean[own], "prompt_std": std[own]}
