"""The pipeline of classic DDPO: Stable Diffusion whose sampler returns log-probabilities, or is differentiable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from trl.diffusion.denoiser import Text
from trl.diffusion.differentiable import first_step, sample_with_gradient
from trl.diffusion.families import StableDiffusion, denoiser_for
from trl.diffusion.pipelines import (
    ADAPTER,
    LORA_FILE,
    add_adapter,
    load_pipeline,
    load_trained,
    module_has_adapter,
    prepare_pipeline,
    save_trained,
    save_whole,
)
from trl.diffusion.schedulers import ddim_schedule
from trl.diffusion.trajectories import sample
from trl.errors import ConfigError
from trl.ops.gaussian import gaussian_logprob


@dataclass
class DDPOPipelineOutput:
    """Pictures `[N,3,H,W]` in [0, 1], the latents of all denoising steps, and the log-probability `[N]` of each step."""

    images: Tensor
    latents: list[Tensor]
    log_probs: list[Tensor]


@dataclass
class DDPOSchedulerOutput:
    """The next latent `[N,…]`, and the log-probability `[N]` of the step to it."""

    latents: Tensor
    log_probs: Tensor


class DefaultDDPOStableDiffusionPipeline:
    """Stable Diffusion by DDIM, with an adapter of rank 4 in the UNet's attention.

    pretrained_model_name       name or folder of a pipeline, or a `StableDiffusionPipeline`
    pretrained_model_revision   revision of a name on the hub
    use_lora                    train an adapter; False: train the whole UNet
    """

    def __init__(
        self, pretrained_model_name: Any, *, pretrained_model_revision: str = "main", use_lora: bool = True
    ) -> None:
        named = isinstance(pretrained_model_name, str | Path)
        options = {"revision": pretrained_model_revision} if named and not Path(pretrained_model_name).is_dir() else {}
        self.sd_pipeline = load_pipeline(pretrained_model_name, **options)
        self.use_lora = use_lora
        self.pretrained_model, self.pretrained_revision = pretrained_model_name, pretrained_model_revision
        self.denoiser = denoiser_for(self.sd_pipeline)
        if not isinstance(self.denoiser, StableDiffusion):
            raise ConfigError(
                f"A {type(self.sd_pipeline).__name__} is no Stable Diffusion with a UNet: use DiffusionGRPOTrainer instead."
            )
        prepare_pipeline(self.sd_pipeline, "unet")
        if use_lora and named and (Path(pretrained_model_name) / LORA_FILE).is_file():
            self.sd_pipeline.load_lora_weights(str(pretrained_model_name), weight_name=LORA_FILE, adapter_name=ADAPTER)

    # ---- parts ----

    @property
    def unet(self) -> nn.Module:
        return self.sd_pipeline.unet

    @property
    def vae(self) -> nn.Module:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> nn.Module:
        return self.sd_pipeline.text_encoder

    @property
    def autocast(self) -> Callable[[], Any]:
        return nullcontext

    def set_progress_bar_config(self, **options: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(**options)

    def get_trainable_layers(self) -> nn.Module:
        """The UNet; adds the adapter first if `use_lora` is set and there is none yet."""
        lora = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian")
        add_adapter(self.unet, lora if self.use_lora and not module_has_adapter(self.unet) else None, "unet")
        return self.unet

    # ---- sampling ----

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Sample pictures with the log-probabilities of their steps; takes arguments of `StableDiffusionPipeline`.

        Supported are prompt or prompt_embeds, negative_prompt or negative_prompt_embeds, height, width,
        num_inference_steps, guidance_scale, num_images_per_prompt, eta, generator and latents.
        """
        call = _Call(self, *args, **kwargs)
        schedule = ddim_schedule(self.scheduler, call.num_inference_steps, eta=call.eta)
        found = sample(
            call.denoiser,
            self.unet,
            call.texts,
            schedule,
            call.seeds(),
            negative=call.negative,
            first_latents=call.latents,
            at_once=len(call.texts),
        )
        latents = found.latents.to(self.unet.device)
        images = call.denoiser.decode(latents[:, -1])
        return DDPOPipelineOutput(images, list(latents.unbind(1)), list(found.logprobs.to(latents).unbind(1)))

    def scheduler_step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        prev_sample: Tensor | None = None,
        **_: Any,
    ) -> DDPOSchedulerOutput:
        """Draw a DDIM step from `sample [N,…]`, or take the step to `prev_sample` if given; return it and its log-probability."""
        schedule = ddim_schedule(self.scheduler, self.scheduler.num_inference_steps, eta=eta)
        timesteps = torch.as_tensor(timestep).flatten()
        timesteps = timesteps.expand(len(sample)) if len(timesteps) == 1 else timesteps
        step = torch.stack([(schedule.timesteps == float(each)).nonzero()[0, 0] for each in timesteps])
        mean, sd = schedule.transition(sample, model_output, step)
        if prev_sample is None:
            prev_sample = mean + sd.view(-1, *[1] * (mean.dim() - 1)) * torch.randn_like(mean)
        return DDPOSchedulerOutput(prev_sample, gaussian_logprob(prev_sample, mean, sd))

    def rgb_with_grad(
        self,
        *args: Any,
        truncated_backprop: bool = True,
        truncated_backprop_rand: bool = True,
        gradient_checkpoint: bool = True,
        truncated_backprop_timestep: int = 49,
        truncated_rand_backprop_minmax: tuple[int, int] = (0, 50),
        **kwargs: Any,
    ) -> DDPOPipelineOutput:
        """Sample pictures with gradients to the UNet through the steps that truncation leaves; without log-probabilities."""
        call = _Call(self, *args, **kwargs)
        schedule = ddim_schedule(self.scheduler, call.num_inference_steps, eta=call.eta)
        first = 0
        if truncated_backprop:
            bounds = truncated_rand_backprop_minmax if truncated_backprop_rand else None
            first = first_step(len(schedule), fixed=truncated_backprop_timestep, drawn_between=bounds)
        states = sample_with_gradient(
            call.denoiser,
            self.unet,
            call.batch,
            schedule,
            call.first_noise(),
            first=first,
            negative=call.negative,
            noise=call.noise,
            recompute=gradient_checkpoint,
        )
        images = call.denoiser.decode(states[-1])
        return DDPOPipelineOutput(images, [state.detach() for state in states], [])

    # ---- files ----

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Save the whole pipeline, and its adapter if it has one; this class loads both."""
        save_whole(self.sd_pipeline, "unet", Path(output_dir))

    def save_checkpoint(self, models: Any, weights: list, output_dir: str | Path) -> None:
        """Save the trained weights to a checkpoint's folder, and empty `weights`, as `accelerate` requires of save hooks."""
        save_trained(self.sd_pipeline, "unet", Path(output_dir))
        if weights:
            weights.pop()

    def load_checkpoint(self, models: list, input_dir: str | Path) -> None:
        """Load what `save_checkpoint` wrote."""
        load_trained(self.unet, "unet", Path(input_dir))
        if models:
            models.pop()


FOLLOWED_ELSEWHERE = ("output_type", "return_dict", "callback_steps")
"""Accepted arguments of other releases without effect: pictures are always tensors."""


class _Call:
    """The arguments of a call, converted for the samplers."""

    def __init__(
        self,
        pipeline: DefaultDDPOStableDiffusionPipeline,
        prompt: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 1.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **others: Any,
    ) -> None:
        if wrong := [name for name, value in others.items() if name not in FOLLOWED_ELSEWHERE and value is not None]:
            raise ConfigError(f"{wrong[0]} is not supported by this pipeline: leave it out.")
        options = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
        self.denoiser = denoiser_for(pipeline.sd_pipeline, height=height, width=width, **options)
        self.num_inference_steps, self.eta = num_inference_steps, eta
        self.generator, self.latents = generator, latents
        self.drawn_on = torch.device("cpu") if generator is None else generator.device
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            self.texts: list[Text] = [
                each for p in prompts for each in self.denoiser.encode([p]) * num_images_per_prompt
            ]
        else:
            self.texts = [{"embeds": each} for each in prompt_embeds]
        self.negative: Mapping[str, Tensor] | None = None
        if self.denoiser.is_guided:
            given = negative_prompt_embeds
            self.negative = self.denoiser.encode_negative() if given is None else {"embeds": given[0]}

    @property
    def batch(self) -> dict[str, Tensor]:
        return self.denoiser.collate(self.texts)

    def seeds(self) -> list[int]:
        return torch.randint(2**62, (len(self.texts),), generator=self.generator, device=self.drawn_on).tolist()

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=self.drawn_on).to(like)

    def first_noise(self) -> Tensor:
        if self.latents is not None:
            return self.latents.to(self.denoiser.module.device)
        shape = (len(self.texts), *self.denoiser.latent_shape)
        return self.noise(torch.empty(shape, device=self.denoiser.module.device))
