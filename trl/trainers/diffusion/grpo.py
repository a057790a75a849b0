"""Group relative policy optimisation of diffusion models: Flow-GRPO for flow matching, and the same on DDIM for UNets.

    A_i = (r_i − mean r) / std r     over K pictures of a prompt
    loss = −min(ρ_t A, clip(ρ_t, 1 ± ε) A) + β KL_t     over the steps of denoising: see `trl.algorithms.diffusion_grpo`

DiffusionGRPOTrainer(model="stabilityai/stable-diffusion-3.5-medium", reward_funcs=pickscore, train_dataset=prompts).train()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from trl.algorithms.advantages import NORMALIZE_THEN_SUM, Scale, has_no_variance
from trl.algorithms.diffusion_grpo import DiffusionGRPO
from trl.algorithms.surrogates import CISPO, SAPO, Clip, Surrogate
from trl.diffusion.denoiser import Text
from trl.diffusion.rollouts import PictureRollouts
from trl.diffusion.solvers import Schedule, within
from trl.diffusion.trajectories import (
    Draws,
    Transition,
    TransitionBatch,
    batch_of,
    score_steps,
    step_of,
    transitions_of,
)
from trl.errors import ConfigError
from trl.ops.gaussian import gaussian_kl
from trl.trainers.diffusion.config import DiffusionRolloutConfig
from trl.trainers.diffusion.rollouts import DiffusionRolloutTrainer
from trl.types import Algorithm, Experience, Metrics


@dataclass
class StepPolicyConfig(DiffusionRolloutConfig):
    """Options of the trainers whose items are denoising steps, each with a likelihood."""

    noise_level: float = 0.7
    """Noise of the denoising steps in training: a of Flow-GRPO's stochastic equation, η of DDIM (where 1 is common)."""

    timestep_fraction: float = 1.0
    """Train on this fraction of the denoising steps, starting from pure noise; Flow-GRPO has 0.99. The last steps of DDIM
    have hardly any noise: they change pictures least but have the largest gradients."""

    def make_algorithm(self) -> Algorithm:
        """The algorithm that these options describe."""
        raise NotImplementedError


@dataclass
class DiffusionGRPOConfig(StepPolicyConfig):
    """Options of `DiffusionGRPOTrainer`."""

    beta: float = 0.0
    """Coefficient of the KL penalty in the loss; Flow-GRPO has 0.01 to 0.04. 0: no reference model is kept."""

    epsilon: float = 1e-4
    """The ratio of a denoising step is clipped below at 1 − epsilon."""

    epsilon_high: float | None = None
    """The ratio is clipped above at 1 + epsilon_high; with loss_type="cispo" it is the largest weight itself. None: as
    `epsilon`, or 5 with "cispo"."""

    loss_type: Literal["clip", "cispo", "sapo"] = "clip"
    """How ratios are bounded: see `trl.algorithms.surrogates`."""

    scale_rewards: Scale | str | bool = "group"
    """Divide advantages by the standard deviation of the "group" or of the "batch" (as Flow-GRPO does), by the "mean" of
    the group, or by nothing ("none")."""

    zero_variance: Literal["keep", "drop"] = "keep"
    """Groups whose rewards are all equal: "keep" them, or "drop" them (not trained on)."""

    sde_window_size: int = 0
    """Add noise and train only in a window of so many consecutive denoising steps; the others are deterministic (MixGRPO,
    arXiv:2507.21802). 0: in all steps."""

    sde_window_range: list[int] | None = None
    """First step of the range that the window lies in, and the step that the range ends before; the window's place is drawn
    for each rollout batch. None: all steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups()
        self._check_window()
        self.make_algorithm()

    def _check_window(self) -> None:
        size, steps = self.sde_window_size, self.num_inference_steps
        first, end = self.sde_window_range or (0, steps)
        if size < 0 or (size and not 0 <= first <= end - size <= steps - size):
            raise ConfigError(
                f"sde_window_size={size} does not lie in steps {first} to {end} of num_inference_steps={steps}."
            )
        trained = trained_steps(steps, self.timestep_fraction)
        if size and end - size >= trained:
            raise ConfigError(
                f"sde_window_size={size} may lie in steps {end - size} to {end}, and timestep_fraction={self.timestep_fraction} "
                f"trains on the first {trained}: nothing would be learned. Set sde_window_range=[{first}, {trained}], or raise it."
            )
        if self.sde_window_range and not size:
            raise ConfigError("sde_window_range has no effect without sde_window_size.")

    def make_algorithm(self) -> DiffusionGRPO:
        gdpo = self.multi_objective_aggregation == NORMALIZE_THEN_SUM
        return DiffusionGRPO(
            scale="batch" if gdpo else self.scale_rewards,
            surrogate=self._surrogate(),
            beta=self.beta,
            advantage_clip=self.advantage_clip,
        )

    def _surrogate(self) -> Surrogate:
        high = self.epsilon_high
        if self.loss_type == "clip":
            return Clip(self.epsilon, self.epsilon if high is None else high)
        if self.loss_type == "cispo":
            return CISPO() if high is None else CISPO(high)
        return SAPO()


def trained_steps(steps: int, share: float) -> int:
    """Number of denoising steps that are trained on, at least one."""
    return max(1, int(steps * share))


class StepPolicyTrainer(DiffusionRolloutTrainer):
    """Base of the trainers whose items are denoising steps, each with a likelihood."""

    config_class = StepPolicyConfig

    def prepare(self) -> None:
        self.algorithm = self.args.make_algorithm()
        # This schedule has noise in all steps, so that it gives the likelihood of any step that is trained on.
        self.schedule = self.denoiser.schedule(self.args.num_inference_steps, eta=self.args.noise_level)
        if self.algorithm.needs_reference:
            self.keep_reference_model()

    def training_schedule(self) -> Schedule:
        return self.schedule

    def advantages(self, experience: Experience) -> Experience:
        return self.algorithm.advantages(experience)

    def kept(self, batch: PictureRollouts) -> Tensor:
        """Which denoising steps are trained on, bool `[N,C]`: the first ones, by timestep_fraction, of rewarded pictures."""
        steps = batch.trajectories.mask.shape[1]
        first = torch.arange(steps) < trained_steps(steps, self.args.timestep_fraction)
        return first & batch.trajectories.mask.bool() & ~batch.rewards.isnan()[:, None]

    def items_of_pictures(self, batch: PictureRollouts, experience: Experience) -> list[list[Transition]]:
        signals = {name: experience.signals[name] for name in ("advantages", "old_logprobs")}
        return transitions_of(batch.trajectories, batch.prompts, self.kept(batch), signals)

    def idle_item(self, batch: PictureRollouts) -> Transition:
        trajectories = batch.trajectories
        first_draw = int(trajectories.mask[0].argmax())
        one = torch.zeros_like(trajectories.mask[:1])
        one[0, first_draw] = 1
        signals = {"advantages": torch.zeros(1), "old_logprobs": trajectories.logprobs[:1]}
        return replace(transitions_of(trajectories, batch.prompts[:1], one, signals)[0][0], is_learned=False)

    def training_negative(self) -> Text | None:
        """Embedding of the negative prompt for guidance in training; None without guidance."""
        return self.embeddings.negative()

    def collate(self, items: Sequence[Transition]) -> TransitionBatch:
        return batch_of(items, self.texts([item.prompt for item in items]))

    def describe(self, items: Sequence[Transition]) -> list[str]:
        return [f"step {item.step} of a picture of {item.prompt!r}" for item in items]

    def loss(self, model: nn.Module, batch: TransitionBatch) -> tuple[Tensor, Metrics]:
        scores, draws = score_steps(self.denoiser, model, batch, self.schedule, self.training_negative())
        sampled = batch.signals["old_logprobs"]
        drift = (scores.logprobs.detach() - sampled).abs()
        if self.args.is_on_policy:
            batch = replace(batch, signals={**batch.signals, "old_logprobs": scores.logprobs.detach()})
        if self.algorithm.needs_reference:
            scores = replace(scores, extras={"kl": self.divergence(draws, batch)})
        loss, metrics = self.algorithm.loss(scores, batch)
        return loss, {**metrics, "sampling/logp_difference": drift}

    def divergence(self, draws: Draws, batch: TransitionBatch) -> Tensor:
        """The exact KL divergence `[M,1]` from the reference, with gradient to the policy."""
        with torch.no_grad(), self.reference() as module:
            mean, _ = step_of(
                self.denoiser, module, batch.latents, batch.step, batch.texts, self.schedule, self.training_negative()
            )
        return gaussian_kl(draws.mean, mean, draws.sd)[:, None]


class DiffusionGRPOTrainer(StepPolicyTrainer):
    """Sample groups of pictures, and raise the probability of the denoising steps of those rewarded above their group's mean.

    Arguments: see `DiffusionRolloutTrainer`.
    """

    config_class = DiffusionGRPOConfig

    def training_schedule(self) -> Schedule:
        """The schedule of the next rollout batch; with sde_window_size, it has noise only in a window that is drawn."""
        steps, args = self.args.num_inference_steps, self.args
        if not args.sde_window_size:
            return self.schedule
        first, end = args.sde_window_range or (0, steps)
        generator = torch.Generator().manual_seed(args.seed + self.rollouts)
        begin = int(torch.randint(first, end - args.sde_window_size + 1, (), generator=generator))
        inside = torch.zeros(steps, dtype=torch.bool)
        inside[begin : begin + args.sde_window_size] = True
        return within(self.schedule, self.denoiser.schedule(steps, eta=0.0), inside)

    def kept(self, batch: PictureRollouts) -> Tensor:
        keep = super().kept(batch)
        if self.args.zero_variance == "drop":
            keep &= ~has_no_variance(batch.rewards, batch.group)[:, None]
        return keep
