"""Convert schedulers of `diffusers` to a `Schedule` of steps for sampling, and add noise as in their training.

UNets of Stable Diffusion are sampled by DDIM with the betas of their pipeline's scheduler; transformers trained by flow
matching with the σ of `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.diffusion.solvers import FLOW_SOLVERS, FlowSolver, Schedule, ddim
from trl.errors import ConfigError
from trl.imports import require

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def as_ddim(scheduler: Any) -> Any:
    """A `DDIMScheduler` with the betas and the prediction type of `scheduler`.

    Raises ConfigError for a scheduler whose noise is not described by betas (flow matching, EDM, consistency models).
    """
    diffusers = require("diffusers", to="Training a diffusion model")
    name, known = type(scheduler).__name__, [each.name for each in diffusers.schedulers.KarrasDiffusionSchedulers]
    if name not in known:
        raise ConfigError(
            f"The pipeline's scheduler is a {name}, which has no betas for DDIM. Give it a scheduler of Stable Diffusion: "
            f"{', '.join(known)}."
        )
    is_ddim = type(scheduler) is diffusers.DDIMScheduler
    found = scheduler if is_ddim else diffusers.DDIMScheduler.from_config(scheduler.config)
    if found.config.thresholding:
        raise ConfigError(
            "The scheduler has thresholding=True, which clips x̂₀ at its own quantiles, so that the mean of a step is not linear "
            "in x̂₀: set thresholding=False."
        )
    return found


def check_flow(scheduler: Any) -> Any:
    """Return the scheduler if it is that of flow matching. Raises ConfigError for others, and for inverted σ."""
    if type(scheduler).__name__ != FLOW_SCHEDULER:
        raise ConfigError(
            f"The pipeline's scheduler is a {type(scheduler).__name__}, but a flow matching model needs a {FLOW_SCHEDULER}: set "
            "pipeline.scheduler to one."
        )
    if scheduler.config.invert_sigmas:
        raise ConfigError("The scheduler has invert_sigmas=True: σ has to fall from 1 to 0. Set invert_sigmas=False.")
    return scheduler


def ddim_schedule(scheduler: Any, steps: int, *, eta: float) -> Schedule:
    """The schedule of a `DDIMScheduler` with `steps` steps and noise strength η."""
    config = scheduler.config
    offset = config.steps_offset if config.timestep_spacing == "leading" else 0
    check_steps(steps, at_most=config.num_train_timesteps - offset)
    scheduler.set_timesteps(steps)
    now, table = (
        scheduler.timesteps.cpu(),
        scheduler.alphas_cumprod.double().cpu(),
    )  # add_noise moves alphas_cumprod to the device of the pictures
    then = now - config.num_train_timesteps // steps
    previous = torch.where(then >= 0, table[then.clamp(min=0)], scheduler.final_alpha_cumprod.double())
    clip = config.clip_sample_range if config.clip_sample else None
    return ddim(table[now], previous, now, eta=eta, prediction=config.prediction_type, clip=clip)


def flow_schedule(scheduler: Any, steps: int, *, eta: float, solver: FlowSolver, length: int, spaced: bool) -> Schedule:
    """The schedule of flow matching with `steps` steps and noise strength η.

    length   sequence length of the latent, by which schedulers with dynamic shifting shift σ
    spaced   whether σ is evenly spaced before it is shifted, as in Flux and Qwen-Image; else the scheduler spaces it
    """
    check_steps(steps, at_most=scheduler.config.num_train_timesteps)
    options = {"mu": shift_of(scheduler.config, length)} if scheduler.config.use_dynamic_shifting else {}
    if spaced:
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(steps, **options)
    return FLOW_SOLVERS[solver](scheduler.sigmas, scheduler.timesteps, eta=eta)


def shift_of(config: Any, length: int) -> float:
    """The shift μ for a latent of `length` positions, interpolated linearly between the two in the scheduler's configuration."""
    short, long = config.base_image_seq_len, config.max_image_seq_len
    return config.base_shift + (config.max_shift - config.base_shift) * (length - short) / (long - short)


def check_steps(steps: int, *, at_most: int) -> None:
    """Raises ConfigError for less than one step, or more than the scheduler has."""
    if not 1 <= steps <= at_most:
        raise ConfigError(f"{steps} denoising steps: give at least 1, and at most the {at_most} of the scheduler.")


# ---- noise of training ----


def add_ddim_noise(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """x_t `[M,…]` of `clean` latents and `noise`, and the model's target for it, at `timesteps` `[M]` of the scheduler."""
    kind = scheduler.config.prediction_type
    noisy = scheduler.add_noise(clean, noise, timesteps)
    if kind == "v_prediction":
        return noisy, scheduler.get_velocity(clean, noise, timesteps)
    return noisy, noise if kind == "epsilon" else clean


def add_flow_noise(clean: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """x = (1 − σ) x₀ + σ ε `[M,…]`, and the velocity ε − x₀, at `sigmas` `[M]`."""
    column = sigmas.to(clean).view(-1, *[1] * (clean.dim() - 1))
    return (1 - column) * clean + column * noise, noise - clean
