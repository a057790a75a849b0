"""The interface of a diffusion model as a policy: encode prompts, run the denoiser, decode latents.

A `Denoiser` wraps a pipeline of `diffusers` and uses its parts: `encode_prompt` for prompts, the VAE for latents, the scheduler
for the steps. The differences between model families (`trl.diffusion.families`) are in these methods:

    schedule(steps, eta)                             the steps of a solver, see `trl.diffusion.solvers`
    encode(prompts)                                  outputs of the text encoders for each prompt
    forward(module, latents, timesteps, texts)       the denoiser's output, for any mixture of samples and steps
    unpack(latents), pack(latents)                   convert latents from the denoiser's layout to the VAE's, and back

The denoiser module itself (`unet` or `transformer`) is an argument, since it may be wrapped for training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.diffusion.solvers import FlowSolver, Schedule
from trl.errors import ConfigError

Text = Mapping[str, Tensor]
"""Outputs of the text encoders by name: for one prompt without a batch dimension, for a batch with one."""


class Denoiser(ABC):
    """A pipeline's model, at one picture size and one guidance scale.

    pipeline          a pipeline of `diffusers`, whose scheduler is replaced by one that training supports
    height, width     in pixels; None: the size that the model was trained with
    guidance_scale    of classifier-free guidance (arXiv:2207.12598), 1 disables it. Guidance-distilled models get it as input
    negative_prompt   prompt that guidance leads away from; None: the pipeline's default
    flow_solver       the stochastic solver of flow matching, a name in `FLOW_SOLVERS`
    max_sequence_length  tokens of a prompt for T5 and Qwen; None: the pipeline's default
    """

    part: ClassVar[str]
    """Attribute of the pipeline with the module to train."""
    parts: ClassVar[tuple[str, ...]]
    """Attributes that the pipeline must have."""

    def __init__(
        self,
        pipeline: Any,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        flow_solver: FlowSolver = "sde",
        max_sequence_length: int | None = None,
    ) -> None:
        if not guidance_scale >= 1:
            raise ConfigError(
                f"guidance_scale={guidance_scale} is below 1, which would weaken the prompt (0 ignores it): give 1 for no "
                "guidance, or more."
            )
        self.pipeline = pipeline
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.flow_solver = flow_solver
        self.encode_options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        self.config = self.module.config
        self.height, self.width = self._size(height), self._size(width)
        self.check()

    @property
    def module(self) -> nn.Module:
        """The denoiser as the pipeline holds it."""
        return getattr(self.pipeline, self.part)

    @property
    def vae(self) -> nn.Module:
        return self.pipeline.vae

    @property
    def is_guided(self) -> bool:
        """Whether classifier-free guidance is used, so that the denoiser runs on both the prompt and the negative prompt."""
        return self.guidance_scale > 1

    def _size(self, pixels: int | None) -> int:
        """The height or width in pixels, by default the model's. Raises ConfigError if it is no multiple of a latent's patch."""
        step = self.pipeline.vae_scale_factor * self.patch
        pixels = self.default_size if pixels is None else pixels
        if pixels < step or pixels % step:
            raise ConfigError(
                f"Pictures of {pixels} pixels: this model needs a height and width that are multiples of {step}."
            )
        return pixels

    @property
    def patch(self) -> int:
        """Side length of a patch, in latent pixels."""
        return 1

    @property
    def default_size(self) -> int:
        return self.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in latent pixels."""
        scale = self.pipeline.vae_scale_factor
        return self.height // scale, self.width // scale

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent in the denoiser's layout."""
        return self.config.in_channels, *self.grid

    @abstractmethod
    def check(self) -> None:
        """Replace the scheduler by one that training supports. Raises ModelError or ConfigError for an unsupported pipeline."""

    # ---- steps ----

    @abstractmethod
    def schedule(self, steps: int, *, eta: float) -> Schedule:
        """The schedule of this family's solver with `steps` steps and noise strength η."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, timesteps and target of `clean` latents `[M,…]` at noise levels `[M]` in [0, 1): the forward process."""

    @abstractmethod
    def noise_share(self, level: Tensor) -> Tensor:
        """σ `[M]` of x_t = α x₀ + σ ε at noise levels `[M]`, the factor from errors of the output to errors of α x̂₀."""

    # ---- text ----

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """Run the text encoders; return their outputs for each of `prompts`."""

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the text encoders' outputs for one prompt, to estimate memory."""

    def encode_negative(self) -> Text:
        """The encoded negative prompt of guidance."""
        return self.encode([self.negative_prompt or ""])[0]

    def collate(self, texts: Sequence[Text], device: Any = None) -> dict[str, Tensor]:
        """Batch the texts of several prompts, `[M,…]`, on `device` (None: their own)."""
        return {name: self._stack([text[name] for text in texts]).to(device) for name in texts[0]}

    def _stack(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values)

    # ---- the model ----

    def output(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text, negative: Text | None = None
    ) -> Tensor:
        """The denoiser's output `[M,…]`, with classifier-free guidance if `negative` is given.

        latents `[M,…]`, timesteps `[M]` and texts `[M,…]` may mix samples and steps: one forward pass serves them all.
        """
        if negative is None:
            return self.forward(module, latents, timesteps, texts)
        count = len(latents)
        both = {name: torch.cat([self._repeated(negative[name], texts[name]), texts[name]]) for name in texts}
        found = self.forward(module, torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
        return self.guide(found[:count], found[count:])

    @staticmethod
    def _repeated(negative: Tensor, texts: Tensor) -> Tensor:
        """Pad `negative` with zeros to the length of `texts [M,L,…]`, and repeat it for each row."""
        if negative.dim() and negative.shape[0] < texts.shape[1]:
            negative = F.pad(negative, [0, 0] * (negative.dim() - 1) + [0, texts.shape[1] - negative.shape[0]])
        return negative.to(texts).expand(len(texts), *negative.shape)

    def guide(self, negative: Tensor, positive: Tensor) -> Tensor:
        """negative + w (positive − negative), w the guidance scale. arXiv:2207.12598."""
        return torch.lerp(negative, positive, self.guidance_scale)

    @abstractmethod
    def forward(self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text) -> Tensor:
        """The denoiser's output `[M,…]` without guidance."""

    def _cast(self, tensor: Tensor) -> Tensor:
        """Cast to the dtype of the denoiser's weights."""
        return tensor.to(self.module.dtype)

    # ---- pictures ----

    def pack(self, latents: Tensor) -> Tensor:
        """Convert latents of the VAE `[M,c,h,w]` to the denoiser's layout."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """Convert latents in the denoiser's layout to that of the VAE."""
        return latents

    def decode(self, latents: Tensor, *, at_once: int = 8) -> Tensor:
        """Decode clean latents `[M,…]` to pictures `[M,3,H,W]` in [0, 1], `at_once` at a time. Gradients flow to the latents."""
        parts = [self._decode(part) for part in latents.split(at_once)]
        return torch.cat(parts)

    def _decode(self, latents: Tensor) -> Tensor:
        raw = self._from_unit(self.unpack(latents)).to(self.vae.dtype)
        return (self._squeeze(self.vae.decode(raw, return_dict=False)[0]).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, at_once: int = 8) -> Tensor:
        """Encode pictures `[M,3,H,W]` in [0, 1] to clean latents, the mode of the VAE's posterior."""
        raw = [self._encode(part) for part in images.split(at_once)]
        return self.pack(self._to_unit(torch.cat(raw)))

    def _encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(self._unsqueeze(images.to(self.vae.dtype) * 2 - 1)).latent_dist.mode().float()

    def _from_unit(self, latents: Tensor) -> Tensor:
        """Undo the normalisation of latents to about unit variance."""
        mean, scale = self._moments(latents)
        return latents / scale + mean

    def _to_unit(self, latents: Tensor) -> Tensor:
        mean, scale = self._moments(latents)
        return (latents - mean) * scale

    def _moments(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean, and reciprocal of the standard deviation, of the VAE's latents."""
        config = self.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return config.get("shift_factor") or 0.0, config.scaling_factor
        shape = (1, -1, *[1] * (latents.dim() - 2))
        mean, deviation = (torch.tensor(each).to(latents).view(shape) for each in (mean, deviation))
        return mean, config.get("scaling_factor", 1.0) / deviation

    def _squeeze(self, images: Tensor) -> Tensor:
        return images

    def _unsqueeze(self, images: Tensor) -> Tensor:
        return images
