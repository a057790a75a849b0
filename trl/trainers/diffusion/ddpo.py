"""Denoising diffusion policy optimisation with the interface of TRL 0.4 to 0.11: functions for prompts and rewards.

    DDPOTrainer(config, reward_function, prompt_function, pipeline, image_samples_hook=None).train()

    prompt_function()                         -> prompt, metadata
    reward_function(images, prompts, metadata) -> rewards, reward_metadata        images [b,3,H,W] in [0, 1]

The loss is that of `trl.algorithms.ddpo`. An epoch samples pictures and trains on them with `StepTrainer`, whose items are
denoising steps, many in a forward pass. For datasets, reward functions by name, and models other than Stable Diffusion see
`DiffusionGRPOTrainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from trl.diffusion.denoiser import Text
from trl.diffusion.pipelines import save_trained
from trl.diffusion.rollouts import IN_ORDER, PictureRollouts, seed_of, split_pictures
from trl.diffusion.trajectories import Transition, TransitionBatch, score_steps
from trl.rewards.call import RewardError
from trl.trainers.diffusion.batch_ddpo import DiffusionDDPOConfig, DiffusionDDPOTrainer
from trl.trainers.diffusion.classic import ClassicTrainer, asked_prompt, two_values
from trl.trainers.diffusion.ddpo_config import DDPOConfig
from trl.trainers.diffusion.pipeline import DefaultDDPOStableDiffusionPipeline
from trl.trainers.tracking import start_tracker
from trl.training.collectives import advantages_over_ranks, all_gather_object

Hook = Callable[[list[list[Any]], int, Any], Any]


@dataclass
class DDPOArguments(DiffusionDDPOConfig):
    """The options of a `DDPOConfig` by the names that the other trainers use."""

    train_cfg: bool = True
    """Train with classifier-free guidance, as pictures were sampled."""

    @property
    def is_on_policy(self) -> bool:
        """Whether an epoch is one optimizer step, with the weights and the guidance that sampled."""
        return self.train_cfg and super().is_on_policy

    @classmethod
    def of(cls, config: DDPOConfig) -> DDPOArguments:
        """Convert the configuration. An epoch becomes a rollout batch, with the training batches of all inner epochs."""
        pictures = config.sample_batch_size * config.sample_num_batches_per_epoch
        batches = pictures // config.train_batch_size * config.train_num_inner_epochs
        return cls(
            **config.shared_arguments(),
            per_device_train_batch_size=config.train_batch_size,
            steps_per_generation=batches,
            num_inference_steps=config.sample_num_steps,
            noise_level=config.sample_eta,
            epsilon=config.train_clip_range,
            guidance_scale=config.sample_guidance_scale,
            negative_prompt=config.negative_prompts,
            advantage_clip=config.train_adv_clip_max,
            save_strategy="steps",
            save_steps=max(1, config.save_freq * batches // config.train_gradient_accumulation_steps),
            logging_strategy="steps",
            logging_steps=1,
            train_cfg=config.train_cfg,
            per_prompt_stat_tracking=config.per_prompt_stat_tracking,
            per_prompt_stat_tracking_buffer_size=config.per_prompt_stat_tracking_buffer_size,
            per_prompt_stat_tracking_min_count=config.per_prompt_stat_tracking_min_count,
        )


class DDPOTrainer(ClassicTrainer, DiffusionDDPOTrainer):
    """Train Stable Diffusion by DDPO (arXiv:2305.13301).

    config               a `DDPOConfig`
    reward_function      (images, prompts, metadata) -> (rewards, reward_metadata): one reward per picture
    prompt_function      () -> (prompt, metadata), called for every picture
    sd_pipeline          a `DefaultDDPOStableDiffusionPipeline`
    image_samples_hook   (batches, global_step, tracker): each batch is [images, prompts, metadata, rewards, reward_metadata]
    """

    config_class = DDPOArguments

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]],
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DefaultDDPOStableDiffusionPipeline,
        image_samples_hook: Hook | None = None,
    ) -> None:
        self.take_arguments(config, DDPOConfig, reward_function, prompt_function, sd_pipeline, image_samples_hook)
        args = DDPOArguments.of(config)
        config.check_batches(args.world_size)
        super().__init__(sd_pipeline.sd_pipeline, _named_as(reward_function), args)
        set_seed(config.seed, device_specific=True)  # different prompts and noise on every process
        self.executor = ThreadPoolExecutor(config.max_workers) if config.async_reward_computation else None
        self._samples: list[list[Any]] = []
        self.tracker = start_tracker(config, self.accelerator)

    @property
    def num_train_timesteps(self) -> int:
        """Number of denoising steps of each picture that are trained on."""
        return max(1, int(self.config.sample_num_steps * self.config.train_timestep_fraction))

    def training_negative(self) -> Text | None:
        return super().training_negative() if self.config.train_cfg else None

    # ---- the loops ----

    def step(self, epoch: int, global_step: int) -> int:
        """Run one epoch (sample, reward, train), for a user's own loop. Returns the number of optimizer steps so far.

        Every save_freq epochs it saves the trained weights. Only `train` writes checkpoints that can be resumed.
        """
        if self.optimizer is None:
            self.create_optimizer()
            self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.state.global_step = global_step
        minibatches, together = self.roll_out(), self.config.train_gradient_accumulation_steps
        self.model.train()
        for start in range(0, len(minibatches), together):
            self.optimizer_step([item for part in minibatches[start : start + together] for item in part])
            self.state.global_step += 1
        self._train_metrics()
        if epoch and epoch % self.config.save_freq == 0 and self.is_world_process_zero():
            save_trained(self.pipeline, self.part, Path(self.args.output_dir) / f"checkpoint_{epoch}")
        return self.state.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts, "buffer": self.buffer.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollouts = state["rollouts"]
        self.buffer.load_state(state["buffer"])

    # ---- an epoch's pictures ----

    def roll_out(self) -> list[list[Transition]]:
        batch = self.sample_epoch()
        experience, _ = advantages_over_ranks(self.experience(batch), self.advantages, self.accelerator)
        self._log_rollouts(batch, experience, "train")
        self.log_epoch(batch)
        count = self.args.minibatches_per_rollout_batch // self.config.train_num_inner_epochs
        minibatches = []
        for inner in range(self.config.train_num_inner_epochs):
            seed = seed_of(self.config.seed, IN_ORDER, self.rollouts * 2**10 + inner)
            self._subset = torch.Generator().manual_seed(seed + 1)
            minibatches += split_pictures(self.items_of_pictures(batch, experience), count, seed=seed)
        self.rollouts += 1
        return [each or [self.idle_item(batch)] for each in minibatches]

    def kept(self, batch: PictureRollouts) -> Tensor:
        """Choose `num_train_timesteps` random steps of each picture."""
        keep = super().kept(batch)
        order = torch.rand(keep.shape, generator=self._subset).argsort(1)
        return keep & (order < self.num_train_timesteps)

    def sample_epoch(self) -> PictureRollouts:
        """Sample the pictures of an epoch and reward them.

        They are sampled in micro-batches that fill a forward pass, and rewarded in batches of sample_batch_size.
        """
        size, count = self.config.sample_batch_size, self.config.sample_num_batches_per_epoch
        asked = [asked_prompt(self.prompt_fn()) for _ in range(size * count)]
        prompts, metadata = [prompt for prompt, _ in asked], [each for _, each in asked]
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        trajectories, images = self.draw(prompts, seeds, self.schedule)
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        batches = [[images[part], tuple(prompts[part]), tuple(metadata[part])] for part in parts]
        rewards, self._samples = self.compute_rewards(batches)
        rows = [{"prompt": prompt, "metadata": each} for prompt, each in zip(prompts, metadata, strict=True)]
        group = torch.arange(len(rows))
        return PictureRollouts(rows, group, trajectories, images.cpu(), rewards[:, None], rewards)

    def compute_rewards(self, prompt_image_pairs: Sequence[list[Any]]) -> tuple[Tensor, list[list[Any]]]:
        """Rewards `[N]` of all batches, and the batches with rewards and reward metadata added, for `image_samples_hook`."""
        spread = map if self.executor is None else self.executor.map
        found, rewards, number = [], [], 0
        given = spread(lambda batch: self.reward_fn(*batch), prompt_image_pairs)
        for (images, prompts, metadata), each in zip(prompt_image_pairs, given, strict=True):
            values, reward_metadata = two_values(each)
            rewards.append(checked_rewards(values, len(prompts), first=number))
            found.append([images, prompts, metadata, rewards[-1].to(images.device), reward_metadata])
            number += len(prompts)
        return torch.cat(rewards), found

    def log_epoch(self, batch: PictureRollouts) -> None:
        """Log the rewards of an epoch to the tracker, and pass its pictures to the hook."""
        if self.image_samples_callback is not None:
            self.image_samples_callback(self._samples, self.state.global_step, self.tracker)
        rewards = torch.cat(all_gather_object(batch.rewards, self.accelerator))
        found = {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
        self.accelerator.log({"epoch": self.rollouts, **found}, step=self.state.global_step)

    def calculate_loss(
        self,
        latents: Tensor,
        timesteps: Tensor,
        next_latents: Tensor,
        log_probs: Tensor,
        advantages: Tensor,
        embeds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, ½ E[(log ρ)²] and fraction of clipped ratios, for one denoising step of each of N pictures.

        timesteps and log_probs are `[N]`; embeds `[2N,L,H]` with guidance (negative ones first), else `[N,L,H]`.
        """
        guided = self.config.train_cfg and self.denoiser.is_guided
        negative = {"embeds": embeds[0]} if guided else None
        step = torch.stack([(self.schedule.timesteps == float(t)).nonzero()[0, 0] for t in timesteps])
        bound = self.config.train_adv_clip_max
        signals = {"old_logprobs": log_probs[:, None], "advantages": advantages.clamp(-bound, bound)}
        texts = {"embeds": embeds[len(latents) :] if guided else embeds}
        mask = torch.ones(len(latents), 1)
        batch = TransitionBatch(
            latents=latents, following=next_latents, step=step, texts=texts, mask=mask, signals=signals
        ).to(self.args.device)
        scores, _ = score_steps(self.denoiser, self.model, batch, self.schedule, negative)
        loss, metrics = self.algorithm.loss(scores, batch)
        return loss.mean(), metrics["approx_kl"].mean(), metrics["clipfrac"].mean()


def checked_rewards(values: Any, count: int, *, first: int) -> Tensor:
    """Rewards `[count]` on the CPU. Raises RewardError for a wrong number of rewards, or one that is not finite.

    `first` is the index in the epoch of the batch's first picture, for the error.
    """
    found = torch.as_tensor(values).detach().float().cpu().flatten()
    if len(found) != count:
        raise RewardError(
            f"The reward function returned {len(found)} rewards for {count} pictures: it has to return one each."
        )
    if not found.isfinite().all():
        i = int((~found.isfinite()).nonzero()[0, 0])
        raise RewardError(f"The reward function returned {found[i].item()} for picture {first + i + 1} of the epoch.")
    return found


def _named_as(function: Callable) -> Callable:
    """A placeholder reward function with the name of `function`, for logs; `compute_rewards` calls `function` itself."""

    def reward(images: Tensor) -> None:
        raise AssertionError("epochs are rewarded by compute_rewards")

    reward.__name__ = getattr(function, "__name__", type(function).__name__)
    return reward
