"""DiffusionNFT: reinforcement learning of diffusion models on the forward process (arXiv:2509.16117).

    pictures of the old policy ──rewards──▶ r ∈ [0, 1] ──noise──▶ r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖²

It needs no likelihoods, so pictures may come from any solver, without noise or guidance, and only the final ones are kept.
See `trl.algorithms.diffusion_nft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl.algorithms.advantages import Scale, advantages
from trl.algorithms.diffusion_dpo import squared_error
from trl.algorithms.diffusion_nft import diffusion_nft, optimality
from trl.diffusion.forward_process import Noised, NoisedBatch, NoisedPicture, levels, noised_batch
from trl.diffusion.pipelines import SwappedWeights
from trl.diffusion.rollouts import IN_ORDER, PictureRollouts, seed_of
from trl.diffusion.solvers import Schedule
from trl.trainers.diffusion.config import DiffusionRolloutConfig
from trl.trainers.diffusion.rollouts import DiffusionRolloutTrainer
from trl.types import Experience, Metrics


@dataclass
class DiffusionNFTConfig(DiffusionRolloutConfig):
    """Options of `DiffusionNFTTrainer`."""

    guidance_scale: float = 1.0
    """Scale of classifier-free guidance in sampling (arXiv:2207.12598); the method needs none. 1: no guidance."""

    nft_beta: float = 1.0
    """β, in (0, 1]: distance of the implicit positive and negative models from the old policy."""

    beta: float = 1e-4
    """Weight of the squared distance between the outputs of model and reference. 0: no reference model is kept."""

    noise_levels: int = 4
    """Number of noised versions of each picture to train on."""

    old_decay_rate: float = 0.001
    """The sampling policy is a moving average of the trained one, with decay min(old_decay_rate · number of the rollout
    batch, old_decay_max)."""

    old_decay_max: float = 0.5
    """Largest decay of that moving average."""

    scale_rewards: Scale | str | bool = "group"
    """Divide advantages by the standard deviation of the "group" or of the "batch", or by nothing ("none")."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups()


class DiffusionNFTTrainer(DiffusionRolloutTrainer):
    """Train the model towards pictures with high rewards, and away from those with low rewards.

    Arguments: see `DiffusionRolloutTrainer`.
    """

    config_class = DiffusionNFTConfig
    item_class = NoisedPicture

    def prepare(self) -> None:
        self.old = SwappedWeights(self.module)
        self.states.register("old_policy", self.old)
        if self.args.beta:
            self.keep_reference_model()

    # ---- pictures ----

    def training_schedule(self) -> Schedule:
        return self.denoiser.schedule(self.args.num_inference_steps, eta=0.0)

    def sampling_policy(self) -> AbstractContextManager[None]:
        decay = min(self.args.old_decay_rate * self.rollouts, self.args.old_decay_max)
        self.old.follow(self.module, decay=decay)
        return self.old.in_place(self.module)

    def experience(self, batch: PictureRollouts) -> Experience:
        return Experience(batch.rewards, batch.group, torch.ones(len(batch.rewards), 1))

    def advantages(self, experience: Experience) -> Experience:
        options = {"baseline": "group", "scale": self.args.scale_rewards}
        found = advantages(experience.rewards, experience.group, **options)
        found = found.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        return experience.with_signals(advantages=found, optimality=optimality(found, bound=self.args.advantage_clip))

    def items_of_pictures(self, batch: PictureRollouts, experience: Experience) -> list[list[NoisedPicture]]:
        found = []
        for n, prompt in enumerate(batch.prompts):
            if batch.rewards[n].isnan():
                found.append([])
                continue
            seed = int(torch.randint(2**40, (), generator=self._generator(n)))
            signals = {"optimality": float(experience.signals["optimality"][n])}
            latents = (batch.trajectories.clean[n],)
            drawn = levels(self.args.noise_levels, seed)
            found.append([NoisedPicture(latents, prompt, level, seed + k, signals) for k, level in enumerate(drawn)])
        return found

    def idle_item(self, batch: PictureRollouts) -> NoisedPicture:
        clean = (batch.trajectories.clean[0],)
        return NoisedPicture(clean, batch.prompts[0], 0.5, 0, {"optimality": 0.5}, is_learned=False)

    def _generator(self, number: int) -> torch.Generator:
        """The random generator for picture `number` of this process and rollout batch."""
        place = (self.rollouts * self.args.world_size + self.args.process_index) * 2**20 + number
        return torch.Generator().manual_seed(seed_of(self.args.seed, IN_ORDER, place))

    # ---- steps ----

    def collate(self, items: Sequence[NoisedPicture]) -> NoisedBatch:
        return noised_batch(items, self.texts([item.prompt for item in items]))

    def describe(self, items: Sequence[NoisedPicture]) -> list[str]:
        return [f"a picture of {item.prompt!r}, at noise level {item.level:.3f}" for item in items]

    def loss(self, model: nn.Module, batch: NoisedBatch) -> tuple[Tensor, Metrics]:
        noised = batch.noised(self.denoiser)
        with torch.no_grad(), self.old.in_place(self.module):
            old = self._output(self.module, noised)
        output = self._output(model, noised)
        good, share = batch.signals["optimality"], self.denoiser.noise_share(batch.level)
        loss = diffusion_nft(output, old, noised.target, good, share, beta=self.args.nft_beta)
        metrics = {"old_distance": squared_error(output.detach(), old), "optimality": good}
        if self.args.beta:
            with torch.no_grad(), self.reference() as module:
                reference = self._output(module, noised)
            distance = squared_error(output, reference)
            loss, metrics["ref_distance"] = loss + self.args.beta * distance, distance.detach()
        return loss[:, None], metrics

    def _output(self, module: nn.Module, noised: Noised) -> Tensor:
        return self.denoiser.forward(module, noised.latents, noised.timesteps, noised.texts)
