"""Drawn pictures with captions, and tiny diffusion models that learn them in a minute or two on a CPU core.

"a red circle", "a blue square": one shape on a grey ground, 16 pixels high and wide. "a circle" is one of any colour.
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
    """A picture `[3,16,16]` in [0, 1] of "a COLOUR SHAPE" or "a SHAPE", at a random place and of a random size."""
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
    """`count` captions in turn, and their pictures `[count,3,16,16]`."""
    generator = torch.Generator().manual_seed(seed)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    return captions, torch.stack([draw(caption, generator) for caption in captions])


# ---- learning them ----


def train_vae(vae: Any, images: Tensor, *, steps: int, seed: int, rate: float = 3e-3, batch_size: int = 16) -> None:
    """Teach the autoencoder to give pictures back, from latents of about unit variance.

    Squared errors tell colours apart early: absolute ones alone are content for long with yellow for red and green. Those make
    edges sharp.
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
    """Teach the denoiser to say what noise there is in pictures, given their captions."""
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
"""Small pipelines by what they are shaped as: Stable Diffusion 2, and 3."""


def make_pipeline(
    kind: str, *, vae: Any = None, vae_steps: int = 200, steps: int = 500, seed: int = 0, **shape: int
) -> Any:
    """A small pipeline that has learned to draw; `shape` are options of the one in `KINDS`. `vae` is one that was trained."""
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
