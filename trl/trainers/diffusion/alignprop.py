"""AlignProp: backpropagate a differentiable reward through the sampler to the weights (arXiv:2310.03739).

    L = 10 − E[r(x₀)],     ∂r/∂θ through the last steps of denoising

AlignPropTrainer(config, reward_function, prompt_function, pipeline, image_samples_hook=None).train(), with the interface of
TRL 0.11; `reward_function(images, prompts, metadata) -> rewards, reward_metadata`, where rewards have a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from trl.diffusion.batches import PictureBatch
from trl.diffusion.differentiable import first_step, sample_with_gradient
from trl.diffusion.trajectories import draw, generators_for
from trl.errors import ConfigError
from trl.rewards.call import RewardError
from trl.trainers.diffusion.classic import ClassicTrainer, asked_prompt, two_values
from trl.trainers.diffusion.config import DiffusionRolloutConfig
from trl.trainers.diffusion.ddpo_config import AlignPropConfig
from trl.trainers.diffusion.pipeline import DefaultDDPOStableDiffusionPipeline
from trl.trainers.tracking import start_tracker
from trl.types import Metrics

OFFSET = 10.0
"""Constant of the loss that keeps it positive for common rewards; it has no gradient."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A picture to sample: its prompt, the seed of its noise, and the metadata of the prompt function."""

    prompt: str
    seed: int
    metadata: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedBatch(PictureBatch):
    """Pictures that are sampled and rewarded in one forward pass."""

    asked: Sequence[Asked]


class AlignPropTrainer(ClassicTrainer):
    """Train Stable Diffusion on a reward with a gradient. Arguments: see `DDPOTrainer`; the hook gets a dict of the batch."""

    config_class = DiffusionRolloutConfig
    item_class = Asked

    def __init__(
        self,
        config: AlignPropConfig,
        reward_function: Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Tensor, Any]],
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: DefaultDDPOStableDiffusionPipeline,
        image_samples_hook: Callable[[dict[str, Any], int, Any], Any] | None = None,
    ) -> None:
        self.take_arguments(config, AlignPropConfig, reward_function, prompt_function, sd_pipeline, image_samples_hook)
        args = DiffusionRolloutConfig(
            **config.shared_arguments(),
            per_device_train_batch_size=config.train_batch_size,
            max_steps_per_micro_batch=config.train_batch_size,
            num_generations=1,
            guidance_scale=config.sample_guidance_scale,
            negative_prompt=config.negative_prompts,
            save_strategy="steps",
            save_steps=config.save_freq,
            logging_strategy="steps",
            logging_steps=1,
        )
        if args.world_size > 1:
            raise ConfigError(
                "AlignProp trains in one process only, since gradients go through many forward passes of the model."
            )
        super().__init__(sd_pipeline.sd_pipeline, args)
        set_seed(config.seed)
        self.schedule = self.denoiser.schedule(config.sample_num_steps, eta=config.sample_eta)
        self.states.register("buffer", self)
        self.tracker = start_tracker(config, self.accelerator)

    # ---- an epoch ----

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state(state)

    def roll_out(self) -> list[list[Asked]]:
        """Draw the prompts and seeds of an epoch's pictures, in batches."""
        found = []
        for _ in range(self.config.train_gradient_accumulation_steps):
            pairs = [asked_prompt(self.prompt_fn()) for _ in range(self.config.train_batch_size)]
            seeds = torch.randint(2**62, (len(pairs),)).tolist()
            found.append([Asked(prompt, seed, metadata) for (prompt, metadata), seed in zip(pairs, seeds, strict=True)])
        return found

    # ---- steps ----

    def collate(self, items: Sequence[Asked]) -> AskedBatch:
        texts = self.texts([item.prompt for item in items])
        return AskedBatch(asked=items, texts=texts, mask=torch.ones(len(items), 1), signals={}, tokens=len(items))

    def describe(self, items: Sequence[Asked]) -> list[str]:
        return [f"a picture of {item.prompt!r}" for item in items]

    def loss(self, model: nn.Module, batch: AskedBatch) -> tuple[Tensor, Metrics]:
        images = self.images(model, batch)
        prompts = tuple(item.prompt for item in batch.asked)
        metadata = tuple(item.metadata for item in batch.asked)
        rewards, reward_metadata = two_values(self.reward_fn(images, prompts, metadata))
        self._check(rewards, len(prompts))
        self._show(images, prompts, metadata, rewards, reward_metadata)
        rewards = rewards.flatten().float()
        return OFFSET - rewards[:, None], {"reward": rewards.detach()}

    def images(self, model: nn.Module, batch: AskedBatch) -> Tensor:
        """Sample the pictures `[N,3,H,W]` of a batch, with gradients through the last denoising steps."""
        config, generators = self.config, generators_for([item.seed for item in batch.asked])
        bounds = config.truncated_rand_backprop_minmax if config.truncated_backprop_rand else None
        first = first_step(len(self.schedule), fixed=config.truncated_backprop_timestep, drawn_between=bounds)
        shape, device = self.denoiser.latent_shape, self.args.device
        states = sample_with_gradient(
            self.denoiser,
            model,
            batch.texts,
            self.schedule,
            draw(shape, generators, device),
            first=first,
            negative=self.embeddings.negative(),
            noise=lambda like: draw(shape, generators, device),
        )
        return self.denoiser.decode(states[-1], at_once=self.args.vae_batch_size)

    def _check(self, rewards: Any, count: int) -> None:
        """Raises RewardError for rewards without a gradient, or of a wrong number."""
        if not isinstance(rewards, Tensor) or (torch.is_grad_enabled() and not rewards.requires_grad):
            raise RewardError(
                "The reward function returned rewards without a gradient: AlignProp needs a tensor that was computed from the "
                "pictures by operations of torch. For other rewards use DDPOTrainer."
            )
        if rewards.numel() != count:
            raise RewardError(f"The reward function returned {rewards.numel()} rewards for {count} pictures.")

    def _show(self, images: Tensor, prompts: tuple, metadata: tuple, rewards: Tensor, reward_metadata: Any) -> None:
        step = self.state.global_step
        if self.image_samples_callback is not None and step % self.config.log_image_freq == 0:
            shown = {"images": images.detach(), "prompts": prompts, "prompt_metadata": metadata}
            shown |= {"rewards": rewards.detach(), "reward_metadata": reward_metadata}
            self.image_samples_callback(shown, step, self.tracker)
