"""DiffusionNFT: reinforcement learning of diffusion models on the forward process (arXiv:2509.16117).

    pictures of the old policy ──rewards──▶ r ∈ [0, 1] ──noise──▶ r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖²

No likelihoods, no noise in sampling, no guidance: any solver makes the pictures, and only the clean ones are kept. See
`trl.algorithms.diffusion_nft`.
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
    """Classifier-free guidance of pictures that are sampled (arXiv:2207.12598); the method needs none. 1: none."""

    nft_beta: float = 1.0
    """β: how far the models of good and of bad pictures are from the old policy, in (0, 1]."""

    beta: float = 1e-4
    """Weight of the squared distance of the output to the reference's. 0: no reference is kept."""

    noise_levels: int = 4
    """Noisy versions of each picture that a step trains on."""

    old_decay_rate: float = 0.001
    """The policy that samples follows the trained one with decay min(rate · rollout batch, old_decay_max): at first it is
    the trained one."""

    old_decay_max: float = 0.5
    """Largest decay."""

    scale_rewards: Scale | str | bool = "group"
    """Divide advantages by the standard deviation of the "group" or of the "batch", or by nothing ("none")."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups()


class DiffusionNFTTrainer(DiffusionRolloutTrainer):
    """Train towards what made good pictures, and away from what made bad ones.

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
        """Of what is drawn for picture `number` of this process and rollout batch."""
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
