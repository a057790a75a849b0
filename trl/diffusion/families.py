"""The supported families of diffusion models: UNets of Stable Diffusion, and transformers trained by flow matching.

Each is a subclass of `trl.diffusion.denoiser.Denoiser`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.diffusion.denoiser import Denoiser, Text
from trl.diffusion.schedulers import (
    add_ddim_noise,
    add_flow_noise,
    as_ddim,
    check_flow,
    ddim_schedule,
    flow_schedule,
)
from trl.diffusion.solvers import Schedule
from trl.errors import ConfigError, ModelError

# ---- UNets ----


class StableDiffusion(Denoiser):
    """Stable Diffusion 1 and 2: a UNet with cross-attention, sampled by DDIM."""

    part = "unet"
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def check(self) -> None:
        if self.encode_options:
            raise ConfigError(
                "max_sequence_length has no effect on CLIP, which reads a fixed number of tokens: leave it out."
            )
        if self.config.in_channels != self.vae.config.latent_channels:
            raise ModelError(
                f"The UNet has {self.config.in_channels} input channels, but the VAE's latents have {self.vae.config.latent_channels}: "
                "models for inpainting or editing need an image besides the prompt, and are not supported."
            )
        if self.config.time_cond_proj_dim is not None:
            raise ModelError(
                "The UNet is guidance-distilled (time_cond_proj_dim), which is not supported: train the model that it was distilled "
                "from."
            )
        self.pipeline.scheduler = as_ddim(self.pipeline.scheduler)

    def schedule(self, steps: int, *, eta: float) -> Schedule:
        return ddim_schedule(self.pipeline.scheduler, steps, eta=eta)

    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        timesteps = (level * self.pipeline.scheduler.config.num_train_timesteps).long().to(clean.device)
        noisy, target = add_ddim_noise(self.pipeline.scheduler, clean, noise, timesteps)
        return noisy, timesteps.float(), target

    def noise_share(self, level: Tensor) -> Tensor:
        scheduler = self.pipeline.scheduler
        timesteps = (level.cpu() * scheduler.config.num_train_timesteps).long()
        return (1 - scheduler.alphas_cumprod[timesteps]).sqrt().to(level)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        embeds, _ = self.pipeline.encode_prompt([*prompts], self.module.device, 1, False)
        return [{"embeds": each} for each in embeds]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeds": (self.pipeline.tokenizer.model_max_length, self.config.cross_attention_dim)}

    def forward(self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text) -> Tensor:
        arguments = {"encoder_hidden_states": self._cast(texts["embeds"]), **self.conditions(texts)}
        return module(self._cast(latents), timesteps, return_dict=False, **arguments)[0]

    def conditions(self, texts: Text) -> dict[str, Any]:
        """Further arguments of the UNet."""
        return {}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and the size of the picture as a condition."""

    parts = ("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [*prompts], device=self.module.device, do_classifier_free_guidance=False
        )
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.pipeline.tokenizer_2.model_max_length
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        return {"embeds": (length, self.config.cross_attention_dim), "pooled": (pooled,)}

    def encode_negative(self) -> Text:
        text = super().encode_negative()
        if self.negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in text.items()}
        return text

    def conditions(self, texts: Text) -> dict[str, Any]:
        size, pooled = (self.height, self.width), self._cast(texts["pooled"])
        ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.to(pooled.device).expand(len(pooled), -1)}}


# ---- transformers of flow matching ----


class FlowDenoiser(Denoiser):
    """A transformer that predicts the velocity ε − x₀ of flow matching."""

    part = "transformer"
    spaced: ClassVar[bool] = False
    """Whether the values of σ are evenly spaced before they are shifted; else the scheduler spaces them."""

    def check(self) -> None:
        check_flow(self.pipeline.scheduler)

    @property
    def length(self) -> int:
        """Number of patches of a latent, the transformer's sequence length for it."""
        height, width = self.grid
        return height * width // self.patch**2

    def schedule(self, steps: int, *, eta: float) -> Schedule:
        options = {"solver": self.flow_solver, "length": self.length, "spaced": self.spaced}
        return flow_schedule(self.pipeline.scheduler, steps, eta=eta, **options)

    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noisy, target = add_flow_noise(clean, noise, level)
        return noisy, level.to(clean.device) * self.pipeline.scheduler.config.num_train_timesteps, target

    def noise_share(self, level: Tensor) -> Tensor:
        return level


class StableDiffusion3(FlowDenoiser):
    """Stable Diffusion 3 and 3.5: a transformer on text and latents jointly, with three text encoders (T5 is optional)."""

    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

    @property
    def patch(self) -> int:
        return self.config.patch_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [*prompts],
            None,
            None,
            device=self.module.device,
            do_classifier_free_guidance=False,
            **self.encode_options,
        )
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.pipeline.tokenizer.model_max_length + self.encode_options.get("max_sequence_length", 256)
        return {"embeds": (length, self.config.joint_attention_dim), "pooled": (self.config.pooled_projection_dim,)}

    def forward(self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text) -> Tensor:
        return module(
            hidden_states=self._cast(latents),
            timestep=timesteps,
            encoder_hidden_states=self._cast(texts["embeds"]),
            pooled_projections=self._cast(texts["pooled"]),
            return_dict=False,
        )[0]


class PackedDenoiser(FlowDenoiser):
    """A transformer that reads latents as sequences of 2 × 2 patches, such as Flux."""

    spaced = True

    @property
    def patch(self) -> int:
        return 2

    @property
    def default_size(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.length, self.config.in_channels

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1 and not self.config.guidance_embeds

    def told_guidance(self, latents: Tensor) -> Tensor | None:
        """The guidance scale as input of a guidance-distilled model; None for other models."""
        if not self.config.guidance_embeds:
            return None
        return torch.full(latents.shape[:1], self.guidance_scale, device=latents.device, dtype=torch.float32)

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, len(latents), self.config.in_channels // 4, *self.grid)

    def unpack(self, latents: Tensor) -> Tensor:
        return self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)


class Flux(PackedDenoiser):
    """Flux: packed latents; guidance-distilled variants get the guidance scale as input."""

    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        embeds, pooled, _ = self.pipeline.encode_prompt([*prompts], device=self.module.device, **self.encode_options)
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.encode_options.get("max_sequence_length", 512)
        return {"embeds": (length, self.config.joint_attention_dim), "pooled": (self.config.pooled_projection_dim,)}

    def forward(self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text) -> Tensor:
        latents, embeds = self._cast(latents), self._cast(texts["embeds"])
        height, width = (side // 2 for side in self.grid)
        return module(
            hidden_states=latents,
            timestep=self._cast(timesteps) / 1000,
            guidance=self.told_guidance(latents),
            pooled_projections=self._cast(texts["pooled"]),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=self.pipeline._prepare_latent_image_ids(1, height, width, latents.device, latents.dtype),
            return_dict=False,
        )[0]


USUAL_PROMPT = 128
"""Assumed length of a prompt in tokens, for families without a fixed length."""


class QwenImage(PackedDenoiser):
    """Qwen-Image: prompts of any length, encoded by a language model; a video VAE; guidance that preserves the output's norm."""

    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        embeds, mask = self.pipeline.encode_prompt([*prompts], device=self.module.device, **self.encode_options)
        lengths = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return [{"embeds": e[:n], "mask": e.new_ones(n, 1)} for e, n in zip(embeds, lengths, strict=True)]

    def _stack(self, values: list[Tensor]) -> Tensor:
        """Pad with zeros to the longest prompt; `mask` `[M,L,1]` is 1 for text and 0 for padding."""
        return nn.utils.rnn.pad_sequence(values, batch_first=True)

    def output(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text, negative: Text | None = None
    ) -> Tensor:
        if negative is not None and (missing := len(negative["embeds"]) - texts["embeds"].shape[1]) > 0:
            texts = {name: F.pad(value, [0, 0, 0, missing]) for name, value in texts.items()}
        return super().output(module, latents, timesteps, texts, negative)

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        length = min(USUAL_PROMPT, self.encode_options.get("max_sequence_length", USUAL_PROMPT))
        return {"embeds": (length, self.config.joint_attention_dim), "mask": (length, 1)}

    def guide(self, negative: Tensor, positive: Tensor) -> Tensor:
        guided = super().guide(negative, positive)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def forward(self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text) -> Tensor:
        latents, mask = self._cast(latents), texts["mask"].squeeze(-1).long()
        height, width = (side // 2 for side in self.grid)
        return module(
            hidden_states=latents,
            timestep=self._cast(timesteps) / 1000,
            guidance=self.told_guidance(latents),
            encoder_hidden_states_mask=None if mask.is_meta or mask.all() else mask,
            encoder_hidden_states=self._cast(texts["embeds"]),
            img_shapes=[[(1, height, width)]] * len(latents),
            return_dict=False,
        )[0]

    def _squeeze(self, images: Tensor) -> Tensor:
        return images[:, :, 0]

    def _unsqueeze(self, images: Tensor) -> Tensor:
        return images[:, :, None]


FAMILIES: dict[str, type[Denoiser]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
}
"""Name of the pipeline's class → family."""


def denoiser_for(pipeline: Any, **options: Any) -> Denoiser:
    """Make the `Denoiser` of a pipeline, with `options` as there.

    Raises ModelError for a pipeline of another class, or one without a required part.
    """
    names = [each.__name__ for each in type(pipeline).__mro__]
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ModelError(
            f"A {type(pipeline).__name__} is not supported: give one of {', '.join(FAMILIES)}, or the name of a model "
            "that diffusers loads as one of them."
        )
    if missing := [part for part in family.parts if getattr(pipeline, part, None) is None]:
        raise ModelError(f"The {type(pipeline).__name__} has no {', '.join(missing)}: load it with all of its parts.")
    return family(pipeline, **options)
