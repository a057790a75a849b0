"""DDPO on a dataset of prompts, with reward functions as all online trainers take them: what `trl ddpo` runs.

    A = clip((r − mean r) / std r, ±c)     over the rollout batch, or what was seen of the same prompt
    loss = −min(ρ_t A, clip(ρ_t, 1 ± ε) A)                                     see `trl.algorithms.ddpo`

The classic interface, functions for prompts and for pairs of rewards and metadata, is `DDPOTrainer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from trl.algorithms.ddpo import DDPO, PromptStatistics
from trl.diffusion.rollouts import PictureBatch
from trl.diffusion.solvers import Schedule
from trl.errors import ConfigError
from trl.trainers.diffusion.config import DiffusionRolloutConfig
from trl.trainers.diffusion.grpo import StepPolicyTrainer, check_share, first_steps
from trl.training.collectives import all_gather_object
from trl.types import Experience


@dataclass
class DiffusionDDPOConfig(DiffusionRolloutConfig):
    """Options of `DiffusionDDPOTrainer`."""

    num_inference_steps: int = 50
    """Denoising steps of pictures that are trained on."""

    num_inference_steps_eval: int = 50
    """Denoising steps of pictures in evaluation and in the report, without noise between them."""

    guidance_scale: float = 5.0
    """Classifier-free guidance (arXiv:2207.12598) of pictures that are sampled, and of steps that are trained on. 1: none."""

    num_generations: int = 1
    """Pictures of each prompt. They are compared with the whole batch, so that 1 will do."""

    noise_level: float = 1.0
    """How noisy the steps are that are trained on: η of DDIM, a of Flow-GRPO's stochastic equation."""

    epsilon: float = 1e-4
    """How far the ratio of a step may move from 1 before it is clipped."""

    timestep_fraction: float = 1.0
    """Train on this share of the steps, from pure noise on. The last steps of DDIM have hardly any noise: they change
    pictures least, and their gradient is the largest, the more so the fewer steps there are."""

    per_prompt_stat_tracking: bool = False
    """Compare rewards with earlier ones of the same prompt, in place of those of the rollout batch."""

    per_prompt_stat_tracking_buffer_size: int = 16
    """Rewards that are remembered of a prompt."""

    per_prompt_stat_tracking_min_count: int = 16
    """Rewards of a prompt from which on they are compared with each other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_level > 0:
            raise ConfigError(f"noise_level={self.noise_level}: steps without noise have no likelihood to train on.")
        check_share(timestep_fraction=self.timestep_fraction)
        self.make_algorithm()

    def make_algorithm(self) -> DDPO:
        """The algorithm that these options describe."""
        return DDPO(clip_range=self.epsilon, advantage_clip=self.advantage_clip)

    def make_statistics(self) -> PromptStatistics | None:
        """What remembers the rewards of prompts, where that is asked for."""
        sizes = (self.per_prompt_stat_tracking_buffer_size, self.per_prompt_stat_tracking_min_count)
        return PromptStatistics(*sizes) if self.per_prompt_stat_tracking else None

    @property
    def is_on_policy(self) -> bool:
        """Whether every rollout batch is trained on once, in the optimizer step for which it was sampled."""
        accumulated = self.gradient_accumulation_steps % self.minibatches_per_rollout_batch
        return self.num_iterations == 1 and accumulated == 0


class DiffusionDDPOTrainer(StepPolicyTrainer):
    """Make the steps likelier that led to pictures rewarded above the batch's mean.

    Arguments: see `DiffusionRolloutTrainer`.
    """

    config_class = DiffusionDDPOConfig

    def prepare(self) -> None:
        self.algorithm = self.args.make_algorithm()
        self.statistics_of_prompts = self.args.make_statistics()
        if self.statistics_of_prompts is not None:
            self.states.register("prompt_statistics", self.statistics_of_prompts)
        super().prepare()

    def noisy_schedule(self) -> Schedule:
        return self.denoiser.schedule(self.args.num_inference_steps, eta=self.args.noise_level)

    def kept(self, batch: PictureBatch) -> Tensor:
        keep = super().kept(batch)
        return keep & first_steps(keep.shape[1], share=self.args.timestep_fraction)

    def experience(self, batch: PictureBatch) -> Experience:
        found = super().experience(batch)
        if self.statistics_of_prompts is None:
            return found
        return found.with_signals(**prompt_moments(self.statistics_of_prompts, batch, self.accelerator))


def prompt_moments(statistics: PromptStatistics, batch: PictureBatch, accelerator: Accelerator) -> dict[str, Tensor]:
    """The signals `prompt_mean` and `prompt_std` `[N]` of this process, from what all processes sampled."""
    everywhere = all_gather_object((batch.prompts, batch.rewards), accelerator)
    prompts = [prompt for part, _ in everywhere for prompt in part]
    mean, std = statistics.update(prompts, torch.cat([rewards for _, rewards in everywhere]))
    start = sum(len(part) for part, _ in everywhere[: accelerator.process_index])
    own = slice(start, start + len(batch.prompts))
    return {"prompt_mean": mean[own], "prompt_std": std[own]}
