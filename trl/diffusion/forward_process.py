"""Clean pictures that are noised for training: items and batches of the methods without log-probabilities of steps.

    x_t = α x₀ + σ ε,     the model predicts its target (noise, velocity or clean latent) at x_t

Every item has its own seed for the noise, so that an optimizer step does not depend on how its items are split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl.diffusion.batches import PictureBatch, learned_of
from trl.diffusion.denoiser import Denoiser, Text
from trl.diffusion.trajectories import draw, generators_for


@dataclass(frozen=True, slots=True)
class NoisedPicture:
    """A clean latent (or the two of a pair), to be noised to `level` in [0, 1) with noise from `seed`; on the host.

    An item with `is_learned=False` only runs through the model, as a dummy.
    """

    latents: tuple[Tensor, ...]
    prompt: str
    level: float
    seed: int
    signals: Mapping[str, float] = field(default_factory=dict)
    is_learned: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedBatch(PictureBatch):
    """M pictures (or pairs) and their noise.

    clean     [M,…] each, of the single pictures, or of the first and second ones of pairs, which share noise and level
    noise     [M,…]
    level     [M]
    """

    clean: tuple[Tensor, ...]
    noise: Tensor
    level: Tensor

    def noised(self, denoiser: Denoiser) -> Noised:
        """The denoiser's inputs and target; of pairs, all first pictures come before all second ones."""
        copies = len(self.clean)
        clean, noise = torch.cat(self.clean), torch.cat([self.noise] * copies)
        latents, timesteps, target = denoiser.add_noise(clean, noise, torch.cat([self.level] * copies))
        texts = {name: torch.cat([value] * copies) for name, value in self.texts.items()}
        return Noised(latents, timesteps, texts, target)


@dataclass(frozen=True, slots=True)
class Noised:
    """Noisy latents `[M,…]`, timesteps `[M]` and texts, and the target `[M,…]` of the denoiser."""

    latents: Tensor
    timesteps: Tensor
    texts: Text
    target: Tensor


def noised_batch(items: Sequence[NoisedPicture], texts: Text) -> NoisedBatch:
    """Collate the items to a batch. `texts` are those of their prompts, in the same order."""
    shape = items[0].latents[0].shape
    return NoisedBatch(
        clean=tuple(torch.stack(each) for each in zip(*(item.latents for item in items), strict=True)),
        noise=draw(shape, generators_for([item.seed for item in items]), "cpu"),
        level=torch.tensor([item.level for item in items]),
        texts=texts,
        signals={name: torch.tensor([item.signals[name] for item in items]) for name in items[0].signals},
        **learned_of(items),
    )


def levels(count: int, seed: int) -> list[float]:
    """`count` noise levels in [0, 1), stratified: one drawn from each of `count` equal parts."""
    places = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return [(k + place) / count for k, place in enumerate(places.tolist())]
