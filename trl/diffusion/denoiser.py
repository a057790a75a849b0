"""A diffusion model as what a policy is made of: text in, a denoiser's output, latents out to pictures.

A `Denoiser` wraps a pipeline of `diffusers` and writes nothing of it again: prompts are encoded by the pipeline's own
`encode_prompt`, latents are decoded by its VAE, steps come from its scheduler. What differs between families
(`trl.diffusion.families`) is in the methods of a class:

    schedule(steps, eta)                             the steps of a solver, see `trl.diffusion.solvers`
    encode(prompts)                                  what the text encoders say of each prompt
    forward(module, latents, timesteps, texts)       the denoiser, on any mixture of samples and steps
    unpack(latents), pack(latents)                   latents as the VAE reads them, and back

The denoiser itself (`unet` or `transformer`) is an argument, since what is trained may be wrapped.
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
"""What the text encoders say of one prompt, without a batch dimension; of several, with one."""


class Denoiser(ABC):
    """A pipeline's model, at one size of pictures and one strength of guidance.

    pipeline          a pipeline of `diffusers`, whose scheduler is replaced by one that can be trained with
    height, width     pixels; None: as the pipeline's model was trained
    guidance_scale    classifier-free guidance (arXiv:2207.12598); 1 is none. Models distilled with it are told the number
    negative_prompt   what guidance leads away from; None: what the pipeline takes where none is given
    flow_solver       the stochastic solver of flow matching, a name in `FLOW_SOLVERS`
    max_sequence_length  tokens of a prompt for T5 and Qwen; None: as many as the pipeline takes
    """

    part: ClassVar[str]
    """Attribute of the pipeline that is trained."""
    parts: ClassVar[tuple[str, ...]]
    """Attributes that the pipeline has to have."""

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
                f"guidance_scale={guidance_scale}: 1 follows the prompt without guidance, and more leads further; below 1 the "
                "prompt is left out in part, at 0 wholly."
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
        """Whether the denoiser runs twice, with the prompt and with the negative one."""
        return self.guidance_scale > 1

    def _size(self, pixels: int | None) -> int:
        """Raises ConfigError for a size that no latent has."""
        step = self.pipeline.vae_scale_factor * self.patch
        pixels = self.default_size if pixels is None else pixels
        if pixels < step or pixels % step:
            raise ConfigError(f"Pictures of {pixels} pixels: this model's are multiples of {step} high and wide.")
        return pixels

    @property
    def patch(self) -> int:
        """Latent pixels that the model takes as one, high and wide."""
        return 1

    @property
    def default_size(self) -> int:
        return self.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def grid(self) -> tuple[int, int]:
        """Latent pixels high and wide."""
        scale = self.pipeline.vae_scale_factor
        return self.height // scale, self.width // scale

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, as the denoiser reads it."""
        return self.config.in_channels, *self.grid

    @abstractmethod
    def check(self) -> None:
        """Make the scheduler one that can be trained with. Raises ModelError or ConfigError for a pipeline that cannot be trained as it is."""

    # ---- steps ----

    @abstractmethod
    def schedule(self, steps: int, *, eta: float) -> Schedule:
        """The `steps` steps of this family's solver, noisy by η."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, timesteps and target of `clean` latents `[M,…]` at noise levels `[M]` in [0, 1): the forward process."""

    @abstractmethod
    def noise_share(self, level: Tensor) -> Tensor:
        """σ `[M]` of x_t = α x₀ + σ ε at noise levels `[M]`: by it an error of the output becomes one of α x̂₀."""

    # ---- text ----

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """What the text encoders say of each of `prompts`."""

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the texts of one prompt, for an estimate."""

    def encode_negative(self) -> Text:
        """What guidance leads away from."""
        return self.encode([self.negative_prompt or ""])[0]

    def collate(self, texts: Sequence[Text], device: Any = None) -> dict[str, Tensor]:
        """Texts of several prompts as a batch `[M,…]`, on `device`; None: where they are."""
        return {name: self._stack([text[name] for text in texts]).to(device) for name in texts[0]}

    def _stack(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values)

    # ---- the model ----

    def output(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text, negative: Text | None = None
    ) -> Tensor:
        """The denoiser's output `[M,…]`, guided where there is a `negative` text.

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
        """`negative` `[…]` for every row of `texts [M,L,…]`, filled up with zeros to its length."""
        if negative.dim() and negative.shape[0] < texts.shape[1]:
            negative = F.pad(negative, [0, 0] * (negative.dim() - 1) + [0, texts.shape[1] - negative.shape[0]])
        return negative.to(texts).expand(len(texts), *negative.shape)

    def guide(self, negative: Tensor, positive: Tensor) -> Tensor:
        """negative + w (positive − negative), w the guidance scale. arXiv:2207.12598."""
        return torch.lerp(negative, positive, self.guidance_scale)

    @abstractmethod
    def forward(self, module: nn.Module, latents: Tensor, timesteps: Tensor, texts: Text) -> Tensor:
        """The output `[M,…]` without guidance."""

    def _cast(self, tensor: Tensor) -> Tensor:
        """As the denoiser's weights are."""
        return tensor.to(self.module.dtype)

    # ---- pictures ----

    def pack(self, latents: Tensor) -> Tensor:
        """Latents of the VAE `[M,c,h,w]` as the denoiser reads them."""
        return latents

    def unpack(self, latents: Tensor) -> Tensor:
        """The denoiser's latents as the VAE's."""
        return latents

    def decode(self, latents: Tensor, *, at_once: int = 8) -> Tensor:
        """Pictures `[M,3,H,W]` in [0, 1] of clean latents `[M,…]`, so many `at_once`. Gradients reach the latents."""
        parts = [self._decode(part) for part in latents.split(at_once)]
        return torch.cat(parts)

    def _decode(self, latents: Tensor) -> Tensor:
        raw = self._from_unit(self.unpack(latents)).to(self.vae.dtype)
        return (self._squeeze(self.vae.decode(raw, return_dict=False)[0]).float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, at_once: int = 8) -> Tensor:
        """Clean latents of pictures `[M,3,H,W]` in [0, 1]: the mode of the VAE's posterior."""
        raw = [self._encode(part) for part in images.split(at_once)]
        return self.pack(self._to_unit(torch.cat(raw)))

    def _encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(self._unsqueeze(images.to(self.vae.dtype) * 2 - 1)).latent_dist.mode().float()

    def _from_unit(self, latents: Tensor) -> Tensor:
        """From latents of about unit variance to those of the VAE."""
        mean, scale = self._moments(latents)
        return latents / scale + mean

    def _to_unit(self, latents: Tensor) -> Tensor:
        mean, scale = self._moments(latents)
        return (latents - mean) * scale

    def _moments(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean, and one over the standard deviation, of the VAE's latents."""
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
