"""Differentiable sampling: gradients flow from pictures through the last denoising steps to the denoiser's weights.

    x_{t+1} = μ_θ(x_t, t) + s_t ε_t,     ∂ picture / ∂ θ through the steps from `first` on

Earlier steps run without gradient; activations of the last steps are recomputed in backward. AlignProp, arXiv:2310.03739;
DRaFT, arXiv:2309.17400.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trl.diffusion.denoiser import Denoiser, Text
from trl.diffusion.solvers import Schedule


def sample_with_gradient(
    denoiser: Denoiser,
    module: nn.Module,
    texts: Text,
    schedule: Schedule,
    latents: Tensor,
    *,
    first: int,
    negative: Text | None = None,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    recompute: bool = True,
) -> list[Tensor]:
    """Sample from the initial `latents`; return those of all C+1 states, `[N,…]` each. Steps from `first` on have gradients.

    noise       returns the noise of a step, in the shape of its argument
    recompute   save no activations of a step, and recompute them in backward
    """
    states = [latents]
    for t in range(len(schedule)):
        step = torch.full((len(latents),), t)
        timesteps = schedule.timesteps[step].to(latents)

        def output(latents: Tensor, timesteps: Tensor = timesteps) -> Tensor:
            return denoiser.output(module, latents, timesteps, texts, negative)

        with torch.set_grad_enabled(torch.is_grad_enabled() and t >= first):
            latents = states[-1]
            found = checkpoint(output, latents, use_reentrant=False) if recompute else output(latents)
            mean, sd = schedule.transition(latents, found, step)
            states.append(mean + sd.view(-1, *[1] * (mean.dim() - 1)) * noise(mean))
    return states


def first_step(steps: int, *, fixed: int, drawn_between: tuple[int, int] | None) -> int:
    """Index of the first of `steps` steps with gradient: drawn from a range, or `fixed`; at most the last step."""
    if drawn_between is None:
        return min(fixed, steps - 1)
    low, high = drawn_between
    return min(int(torch.randint(low, high, ())), steps - 1)
