"""Stochastic solvers, whose steps sample from a Gaussian. A step of a diffusion model is what a token is to a language model.

A denoiser's output at a noisy latent x gives an estimate x̂₀ of the clean latent, and ε̂ of the noise in x. Every solver here
samples the next latent from

    x' ~ N(μ, s² I),     μ = a x̂₀ + b ε̂

for a schedule with x = α x₀ + σ ε, and next α', σ':

    ddim       a = α',  b = √(σ'² − s²),     s = η · σ'/σ · √(1 − α²/α'²)     Song et al. 2020, arXiv:2010.02502, Eqs. 12, 16
    flow_sde   a = α',  b = σ' − s²/2σ,      s = g √(σ − σ'),  g = η √(σ / (1 − σ))      Flow-GRPO, arXiv:2505.05470
    flow_cps   a = α',  b = √(σ'² − s²),     s = σ' sin(η π/2)                           Flow-CPS, arXiv:2509.05952

`ddim` is for α² + σ² = 1, the other two are for α + σ = 1 (flow matching). The b of `flow_sde` equals that of the others to
first order in s². At η = 0 they are deterministic: DDIM, and Euler's method. So any subset of the steps can be stochastic and
the others deterministic (MixGRPO, arXiv:2507.21802).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trl.errors import ConfigError
from trl.ops.shapes import shapes

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]

SMALLEST_SD = 1e-6
"""A step with a smaller standard deviation counts as deterministic, without a log-density."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The coefficients of a solver's C steps, in float64 on the host.

    timesteps   [C] the denoiser's timestep input
    clean       [C,2] x̂₀ = clean₀ · x + clean₁ · output
    noise       [C,2] ε̂ = noise₀ · x + noise₁ · output
    mean        [C,2] μ = mean₀ · x̂₀ + mean₁ · ε̂
    sd          [C] standard deviation of a step; 0 if it is deterministic
    clip        bound of |x̂₀| if the scheduler clips it, else None
    """

    timesteps: Tensor
    clean: Tensor
    noise: Tensor
    mean: Tensor
    sd: Tensor
    clip: float | None = None

    def __len__(self) -> int:
        return len(self.sd)

    @property
    def is_stochastic(self) -> Tensor:
        """[C] bool: which steps sample from a Gaussian, and so have a log-density."""
        return self.sd > SMALLEST_SD

    @shapes(latents="M ...", output="M ...", step="M")
    def transition(self, latents: Tensor, output: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """μ `[M,…]` and s `[M]` in float32 of the steps with indices `step [M]`, from `latents` and `output` `[M,…]`."""
        step = step.cpu()
        latents, output = latents.float(), output.float()
        clean, noise, mean = self.clean[step], self.noise[step], self.mean[step]
        if self.clip is None:
            # Combine the factors of both estimates in float64 first: near pure noise, x̂₀ alone is ill-conditioned.
            factors = mean[:, :1] * clean + mean[:, 1:] * noise
            found = _combine(factors, latents, output)
        else:
            estimate = _combine(clean, latents, output).clamp(-self.clip, self.clip)
            found = _combine(mean, estimate, _combine(noise, latents, output))
        return found, self.sd[step].to(found)


def _combine(factors: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """factors₀ · first + factors₁ · second, of `factors [M,2]` and latents `[M,…]`."""
    a, b = factors.to(first).view(len(factors), 2, *[1] * (first.dim() - 1)).unbind(1)
    return a * first + b * second


# ---- estimates from the denoiser's output ----

ESTIMATES: dict[Prediction, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha, torch.zeros_like(alpha), torch.ones_like(alpha)),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma, sigma, alpha),
    "sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha), 1 / sigma, -alpha / sigma),
    "flow": lambda alpha, sigma: (torch.ones_like(alpha), -sigma, torch.ones_like(alpha), alpha),
}
"""Prediction type → the factors of x and output in x̂₀, then in ε̂, for x = α x₀ + σ ε.

"v_prediction" is α ε − σ x₀ (arXiv:2202.00512), for α² + σ² = 1; "flow" is ε − x₀, for α + σ = 1.
"""


def _schedule(
    alpha: Tensor,
    sigma: Tensor,
    prediction: Prediction,
    mean: Tensor,
    sd: Tensor,
    timesteps: Tensor,
    clip: float | None,
) -> Schedule:
    factors = torch.stack(ESTIMATES[prediction](alpha, sigma), -1)
    if not factors.isfinite().all():
        raise ConfigError(
            f"prediction_type={prediction!r} does not determine the clean picture at pure noise (or at no noise), where this "
            "scheduler has a step: with zero terminal SNR, a model has to predict v (prediction_type='v_prediction')."
        )
    return Schedule(timesteps.double().cpu(), factors[:, :2], factors[:, 2:], mean, sd, clip)


# ---- the solvers ----


def ddim(
    alphas_cumprod: Sequence[float] | Tensor,
    previous: Sequence[float] | Tensor,
    timesteps: Tensor,
    *,
    eta: float,
    prediction: Prediction = "epsilon",
    clip: float | None = None,
) -> Schedule:
    """DDIM with noise strength η: 0 is deterministic, 1 is DDPM. arXiv:2010.02502, Eqs. 12 and 16.

    alphas_cumprod   [C] ᾱ = α² of the latent before each step
    previous         [C] ᾱ of the latent after it
    """
    now, then = (torch.as_tensor(values, dtype=torch.float64) for values in (alphas_cumprod, previous))
    sd = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    mean = torch.stack([then.sqrt(), (1 - then - sd.square()).clamp(min=0).sqrt()], -1)
    return _schedule(now.sqrt(), (1 - now).sqrt(), prediction, mean, sd, timesteps, clip)


def flow_sde(sigmas: Tensor, timesteps: Tensor, *, eta: float) -> Schedule:
    """Flow matching as an SDE with the same marginals. Flow-GRPO, arXiv:2505.05470, where η is called a.

    `sigmas [C+1]` fall from 1 to 0. g is infinite at σ = 1, so that the next σ is used in it, as in the authors' code.
    """
    now, then = _pairs(sigmas)
    inside = torch.where(now == 1, then, now)
    sd = eta * (inside / (1 - inside)).sqrt() * (now - then).sqrt()
    mean = torch.stack([1 - then, then - sd.square() / (2 * now)], -1)
    return _schedule(1 - now, now, "flow", mean, sd, timesteps, None)


def flow_cps(sigmas: Tensor, timesteps: Tensor, *, eta: float) -> Schedule:
    """Flow matching where new noise replaces a part of the predicted noise, so that σ' is kept. Flow-CPS, arXiv:2509.05952."""
    now, then = _pairs(sigmas)
    sd = then * math.sin(eta * math.pi / 2)
    mean = torch.stack([1 - then, (then.square() - sd.square()).clamp(min=0).sqrt()], -1)
    return _schedule(1 - now, now, "flow", mean, sd, timesteps, None)


def _pairs(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """σ of the latents before and after each step."""
    sigmas = sigmas.double().cpu()
    return sigmas[:-1], sigmas[1:]


FlowSolver = Literal["sde", "cps"]
FLOW_SOLVERS: dict[FlowSolver, Callable[..., Schedule]] = {"sde": flow_sde, "cps": flow_cps}
"""Names of the stochastic solvers of flow matching."""


def within(noisy: Schedule, quiet: Schedule, steps: Tensor) -> Schedule:
    """The stochastic schedule `noisy` in `steps` (`[C]` bool), and its deterministic version `quiet` in the others.

    MixGRPO, arXiv:2507.21802.
    """
    mean = torch.where(steps[:, None], noisy.mean, quiet.mean)
    return replace(noisy, mean=mean, sd=torch.where(steps, noisy.sd, quiet.sd))
