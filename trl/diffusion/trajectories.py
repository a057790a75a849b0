"""Sample denoising trajectories step by step, and score their steps in one forward pass.

    x_T ~ N(0, I),     x_{t+1} ~ N(μ_θ(x_t, t), s_t² I),     log π(x_{t+1} | x_t) its log-density, averaged over dimensions

A trajectory is to a diffusion model what a completion is to a language model, and a step is what a token is. Since the noisy
latents are stored, any steps of any trajectories can be scored in one forward pass.
DDPO, arXiv:2305.13301; Flow-GRPO, arXiv:2505.05470.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.diffusion.batches import PictureBatch, learned_of
from trl.diffusion.denoiser import Denoiser, Text
from trl.diffusion.solvers import Schedule
from trl.ops.gaussian import gaussian_entropy, gaussian_logprob
from trl.types import Scores


@dataclass(frozen=True, slots=True)
class Trajectories:
    """N trajectories of C steps, on the host.

    latents     [N,C+1,…] from pure noise to the clean latent
    logprobs    [N,C] log-density of each step under the policy that sampled it; 0 for deterministic steps
    mask        [N,C] 1 for stochastic steps
    """

    latents: Tensor
    logprobs: Tensor
    mask: Tensor

    @property
    def clean(self) -> Tensor:
        """The clean latents [N,…], from which pictures are decoded."""
        return self.latents[:, -1]


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of a trajectory, on the host: an item of an optimizer step.

    latents, following   the noisy latents before and after the step
    step                 index of the step in the schedule
    prompt               the prompt of the picture
    signals              named numbers of the step: advantages, old_logprobs, …
    is_learned           whether it is trained on; if not, it only runs through the model, as a dummy
    """

    latents: Tensor
    following: Tensor
    step: int
    prompt: str
    signals: Mapping[str, float] = field(default_factory=dict)
    is_learned: bool = True


def transitions_of(
    trajectories: Trajectories, prompts: Sequence[str], keep: Tensor, signals: Mapping[str, Tensor]
) -> list[list[Transition]]:
    """The steps of each trajectory that are selected by `keep` `[N,C]`, with their `signals` `[N]` or `[N,C]`."""
    found: list[list[Transition]] = [[] for _ in prompts]
    for n, t in keep.nonzero().tolist():
        numbers = {name: float(v[n] if v.dim() == 1 else v[n, t]) for name, v in signals.items()}
        pair = trajectories.latents[n, t], trajectories.latents[n, t + 1]
        found[n].append(Transition(*pair, t, prompts[n], numbers))
    return found


# ---- noise ----


def draw(shape: Sequence[int], generators: Sequence[torch.Generator], device: Any) -> Tensor:
    """Noise `[N,…]` with one generator for each row, so that a picture does not depend on others in its batch."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


def generators_for(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- sampling ----


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    module: nn.Module,
    texts: Sequence[Text],
    schedule: Schedule,
    seeds: Sequence[int],
    *,
    negative: Text | None = None,
    first_noise: Sequence[int] | None = None,
    first_latents: Tensor | None = None,
    at_once: int = 8,
) -> Trajectories:
    """Sample a trajectory for each of `texts` and `seeds`, `at_once` at a time.

    `first_noise` are separate seeds for x_T, so that samples of a group can start from the same noise. `first_latents` `[N,…]`
    gives x_T itself.
    """
    parts = []
    for start in range(0, len(texts), at_once):
        part = slice(start, start + at_once)
        generators = generators_for(seeds[part])
        if first_latents is None:
            firsts = generators if first_noise is None else generators_for(first_noise[part])
            latents = draw(denoiser.latent_shape, firsts, denoiser.module.device)
        else:
            latents = first_latents[part].to(denoiser.module.device, torch.float32)
        batch = denoiser.collate(texts[part], latents.device)
        parts.append(_sample_part(denoiser, module, batch, negative, schedule, latents, generators))
    return Trajectories(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _sample_part(
    denoiser: Denoiser,
    module: nn.Module,
    texts: Text,
    negative: Text | None,
    schedule: Schedule,
    latents: Tensor,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor, Tensor]:
    states, logprobs = [latents], []
    for t, is_draw in enumerate(schedule.is_stochastic.tolist()):
        step = torch.full((len(latents),), t)
        mean, sd = step_of(denoiser, module, states[-1], step, texts, schedule, negative)
        if is_draw:
            noise = draw(denoiser.latent_shape, generators, mean.device)
            states.append(mean + sd.view(-1, *[1] * (mean.dim() - 1)) * noise)
            logprobs.append(gaussian_logprob(states[-1], mean, sd))
        else:
            states.append(mean)
            logprobs.append(torch.zeros_like(sd))
    mask = schedule.is_stochastic.float().expand(len(latents), -1)
    return torch.stack(states, 1).cpu(), torch.stack(logprobs, 1).cpu(), mask


# ---- scoring ----


def step_of(
    denoiser: Denoiser,
    module: nn.Module,
    latents: Tensor,
    step: Tensor,
    texts: Text,
    schedule: Schedule,
    negative: Text | None = None,
) -> tuple[Tensor, Tensor]:
    """μ `[M,…]` and s `[M]` of the steps with indices `step [M]` from `latents [M,…]`, in one forward pass (of 2M rows with
    guidance)."""
    timesteps = schedule.timesteps[step.cpu()].to(latents)
    output = denoiser.output(module, latents, timesteps, texts, negative)
    return schedule.transition(latents, output, step)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionBatch(PictureBatch):
    """M steps of any trajectories.

    latents, following   [M,…] before and after the step
    step                 [M] index of the step in the schedule, on the host
    """

    ON_HOST = ("step",)

    latents: Tensor
    following: Tensor
    step: Tensor


def batch_of(transitions: Sequence[Transition], texts: Mapping[str, Tensor]) -> TransitionBatch:
    """Collate the steps to a batch. `texts` are those of their prompts, in the same order.

    The signal `old_logprobs` is `[M,1]`, since algorithms expect a number per token; others are `[M]`.
    """
    names = transitions[0].signals
    signals = {name: torch.tensor([each.signals[name] for each in transitions]) for name in names}
    if "old_logprobs" in signals:
        signals["old_logprobs"] = signals["old_logprobs"][:, None]
    return TransitionBatch(
        latents=torch.stack([each.latents for each in transitions]),
        following=torch.stack([each.following for each in transitions]),
        step=torch.tensor([each.step for each in transitions]),
        texts=texts,
        signals=signals,
        **learned_of(transitions),
    )


@dataclass(frozen=True, slots=True)
class Draws:
    """The Gaussians of the steps: means `[M,…]` and standard deviations `[M]`."""

    mean: Tensor
    sd: Tensor


def score_steps(
    denoiser: Denoiser,
    module: nn.Module,
    batch: TransitionBatch,
    schedule: Schedule,
    negative: Text | None = None,
) -> tuple[Scores, Draws]:
    """Score a batch's steps under the policy, with gradient: log-densities `[M,1]`, and the entropy per dimension `[M,1]`.

    The entropy depends on the schedule only.
    """
    mean, sd = step_of(denoiser, module, batch.latents, batch.step, batch.texts, schedule, negative)
    logprobs = gaussian_logprob(batch.following, mean, sd)
    return Scores(logprobs[:, None], entropy=gaussian_entropy(sd)[:, None]), Draws(mean, sd)
