"""Drawn pictures with captions, and tiny diffusion models that learn to draw them in a minute or two on a CPU core.

"a red circle", "a blue square": one shape on a grey background, 16 × 16 pixels. "a circle" has any colour.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trl.demo.pipelines import tiny_stable_diffusion, tiny_stable_diffusion_3
from trl.diffusion.denoiser import Denoiser
from trl.diffusion.families import denoiser_for
from trl.rewards.images import COLORS

SIZE = 16
SHAPES = ("circle", "square")
DRAWN = ("red", "green", "blue", "yellow")
WORDS = ("a", *DRAWN, *SHAPES)
COLORED = tuple(f"a {color} {shape}" for color in DRAWN for shape in SHAPES)
PLAIN = tuple(f"a {shape}" for shape in SHAPES)
CAPTIONS = (*COLORED, *PLAIN)
GROUND = 0.5


def draw(caption: str, generator: torch.Generator) -> Tensor:
    """Draw "a COLOUR SHAPE" or "a SHAPE" with random position and size: a picture `[3,16,16]` in [0, 1]."""
    *colors, shape = caption.split()[1:]
    color = colors[0] if colors else DRAWN[int(torch.randint(len(DRAWN), (), generator=generator))]
    radius = 3.5 + 2 * torch.rand((), generator=generator)
    middle = SIZE / 2 + (torch.rand(2, generator=generator) - 0.5) * 4
    rows, columns = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij")
    away = torch.stack([rows - middle[0], columns - middle[1]]).abs()
    distance = away.square().sum(0).sqrt() if shape == "circle" else away.amax(0)
    inside = (radius - distance + 0.5).clamp(0, 1)
    return GROUND * (1 - inside) + torch.tensor(COLORS[color])[:, None, None] * inside


def draw_many(count: int, *, seed: int = 0) -> tuple[list[str], Tensor]:
    """`count` captions, cycling through `CAPTIONS`, and their pictures `[count,3,16,16]`."""
    generator = torch.Generator().manual_seed(seed)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    return captions, torch.stack([draw(caption, generator) for caption in captions])


# ---- training ----


def train_vae(vae: Any, images: Tensor, *, steps: int, seed: int, rate: float = 3e-3, batch_size: int = 16) -> None:
    """Train the autoencoder to reconstruct pictures, with latents of about unit variance.

    The loss is the sum of absolute and squared errors. Squared errors separate colours early (absolute errors alone
    draw red and green as yellow for many steps); absolute errors make edges sharp.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)] * 2 - 1
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mean + 0.1 * torch.randn(posterior.mean.shape, generator=generator)
        missed = vae.decode(latents).sample - batch
        error = missed.abs().mean() + missed.square().mean()
        spread = (posterior.mean.flatten(1).var() - 1).square() + posterior.mean.mean().square()
        (error + 0.1 * spread).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def train_denoiser(
    denoiser: Denoiser,
    captions: list[str],
    images: Tensor,
    *,
    steps: int,
    seed: int,
    rate: float = 2e-3,
    batch_size: int = 32,
) -> None:
    """Train the denoiser on noised latents of pictures, given their captions."""
    generator = torch.Generator().manual_seed(seed)
    module = denoiser.module.train()
    latents = denoiser.encode_images(images, at_once=64)
    texts = denoiser.collate(denoiser.encode(CAPTIONS))
    number = torch.tensor([CAPTIONS.index(caption) for caption in captions])
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        picked = torch.randint(len(images), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, *denoiser.latent_shape, generator=generator)
        noisy, timesteps, target = denoiser.add_noise(
            latents[picked], noise, torch.rand(batch_size, generator=generator)
        )
        told = {name: value[number[picked]] for name, value in texts.items()}
        loss = (denoiser.forward(module, noisy, timesteps, told) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    module.eval()


KINDS: dict[str, Callable[..., Any]] = {
    "unet": partial(tiny_stable_diffusion, prediction="v_prediction", spacing="trailing"),
    "flow": tiny_stable_diffusion_3,
}
"""Small pipelines with the architecture of Stable Diffusion 2 ("unet") and 3 ("flow")."""


def make_pipeline(
    kind: str, *, vae: Any = None, vae_steps: int = 200, steps: int = 500, seed: int = 0, **shape: int
) -> Any:
    """Make and train a small pipeline of `KINDS`, which takes the options `shape`. `vae` is a trained autoencoder to
    reuse."""
    pipeline = KINDS[kind](WORDS, seed=seed, **shape)
    pipeline.set_progress_bar_config(disable=True)
    captions, images = draw_many(512, seed=seed)
    options = {} if kind == "unet" else {"max_sequence_length": 8}
    if vae is None:
        train_vae(pipeline.vae, images, steps=vae_steps, seed=seed)
        pipeline.vae.eval().requires_grad_(False)
    else:
        pipeline.register_modules(vae=vae)
    train_denoiser(denoiser_for(pipeline, **options), captions, images, steps=steps, seed=seed)
    return pipeline
