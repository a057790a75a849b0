"""Base of the diffusion trainers that train on sampled pictures: sample, decode, reward, compute advantages, train.

    prompt ──sampler──▶ K pictures ──reward functions──▶ rewards ──advantages──▶ items ──▶ optimizer steps

A rollout batch is sampled when training reaches its first minibatch. The seed of a picture depends only on its position in
the run, not on the batch size nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trl.algorithms.advantages import combine_rewards, group_std
from trl.compat.hooks import SAMPLER
from trl.data.examples import columns_of
from trl.diffusion.rollouts import IN_TRAINING, PictureRollouts, Row, seed_of, split_pictures
from trl.diffusion.solvers import Schedule
from trl.diffusion.trajectories import Transition
from trl.errors import ConfigError
from trl.rewards.call import call_rewards, warn_of_none
from trl.rewards.pictures import PictureSamples, make_picture_rewards
from trl.rollouts.prompts import Prompts
from trl.trainers.diffusion.base import DiffusionTrainer, check_prompt
from trl.trainers.diffusion.config import DiffusionRolloutConfig
from trl.training.collectives import advantages_over_ranks, gather_rows
from trl.types import Experience


class DiffusionRolloutTrainer(DiffusionTrainer):
    """Base of the trainers that train on pictures which the model samples.

    reward_funcs    one or several functions `(prompts, images, **columns) -> rewards`, async or not

    The other arguments are those of `DiffusionTrainer`. Columns of the dataset go to the reward functions.
    """

    config_class = DiffusionRolloutConfig
    item_class = Transition
    uncalled = DiffusionTrainer.uncalled | SAMPLER

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *arguments: Any, **keywords: Any
    ) -> None:
        super().__init__(model, args, *arguments, **keywords)
        rows = self.eval_dataset if self.train_dataset is None else self.train_dataset
        columns = [] if rows is None else [name for name in columns_of(rows) if name != "prompt"]
        self.rewards = make_picture_rewards(reward_funcs, weights=self.args.reward_weights, columns=columns)
        self.prompts: Prompts | None = None
        self.rollouts = 0
        self.states.register("rollouts", self, per_rank=True)
        self.prepare()

    def prepare(self) -> None:
        """Hook for subclasses: create algorithm, schedule and reference; called at the end of construction."""

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts and the rollout batch, for checkpoints."""
        return {"cursor": self.prompts.cursor, "rollouts": self.rollouts, "buffer": self.buffer.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prompts.cursor, self.rollouts = state["cursor"], state["rollouts"]
        if not self.args.ignore_data_skip:
            self.buffer.load_state(state["buffer"])

    # ---- prompts ----

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        if self.train_dataset is None:
            raise ConfigError("train_dataset is missing: give rows with `prompt`.")
        shuffle = {"seed": args.seed, "shuffle": args.shuffle_dataset}
        self.prompts = Prompts(self.train_dataset, **shuffle, rank=args.process_index, world=args.world_size)
        return self.loader_of_minibatches(self.prompts.batches_per_epoch(args.prompts_per_rollout_batch))

    # ---- a rollout batch ----

    def roll_out(self) -> list[list[Any]]:
        """Sample pictures, reward them and compute advantages; return the minibatches of this rollout batch."""
        args = self.args
        count, first = args.prompts_per_rollout_batch, self.prompts.cursor
        places = [first + turn * args.world_size + args.process_index for turn in range(count)]
        rows = self.prompts.take(count)
        numbers = [place * args.num_generations + k for place in places for k in range(args.num_generations)]
        seeds = [seed_of(args.seed, IN_TRAINING, number) for number in numbers]
        with self.sampling_policy():
            batch = self.sample_pictures(rows, args.num_generations, seeds, self.training_schedule())
        experience, _ = advantages_over_ranks(self.experience(batch), self.advantages, self.accelerator)
        self._log_rollouts(batch, experience, "train")
        items = split_pictures(
            self.items_of_pictures(batch, experience),
            args.minibatches_per_rollout_batch,
            seed=args.seed + self.rollouts,
        )
        self.rollouts += 1
        # All processes have to take every step, also one whose minibatch has nothing to train on.
        return [each or [self.idle_item(batch)] for each in items]

    def training_schedule(self) -> Schedule:
        """The schedule with which pictures for training are sampled."""
        raise NotImplementedError

    def advantages(self, experience: Experience) -> Experience:
        """The experience with the signal `advantages`, and others that the loss needs."""
        raise NotImplementedError

    def items_of_pictures(self, batch: PictureRollouts, experience: Experience) -> list[list[Any]]:
        """The items to train on, for each picture."""
        raise NotImplementedError

    def idle_item(self, batch: PictureRollouts) -> Any:
        """An item with no effect on the weights, for a minibatch without items to train on."""
        raise NotImplementedError

    def experience(self, batch: PictureRollouts) -> Experience:
        """The rollout batch of this process as the `Experience` that algorithms take."""
        trajectories = batch.trajectories
        return Experience(
            batch.rewards, batch.group, trajectories.mask, signals={"old_logprobs": trajectories.logprobs}
        )

    # ---- sampling ----

    def sampling_policy(self) -> AbstractContextManager[None]:
        """Context in which the model has the weights that sample pictures for training; by default the current ones."""
        return nullcontext()

    def sample_pictures(
        self, rows: Sequence[Row], each: int, seeds: Sequence[int], schedule: Schedule
    ) -> PictureRollouts:
        """Sample `each` pictures of every row, and reward them."""
        repeated = [row for row in rows for _ in range(each)]
        prompts = [check_prompt(row["prompt"], "A row") for row in repeated]
        group = torch.arange(len(rows)).repeat_interleave(each)
        first_noise = [seeds[i - i % each] for i in range(len(seeds))] if self.args.same_initial_noise else None
        trajectories, images = self.draw(prompts, seeds, schedule, first_noise)
        values = self.reward(repeated, images)
        return PictureRollouts(repeated, group, trajectories, images.cpu(), values, self.combined(values, group))

    def combined(self, values: Tensor, group: Tensor) -> Tensor:
        """Combine the rewards of all functions `[N,F]` into one per picture, `[N]`."""
        weights = torch.tensor([reward.weight for reward in self.rewards])
        return combine_rewards(values, weights, group, aggregation=self.args.multi_objective_aggregation)

    def reward(self, rows: Sequence[Row], images: Tensor) -> Tensor:
        """Rewards `[N,F]` of every function. Raises RewardError, with function and picture, for a reward that is not finite."""
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        samples = PictureSamples.of(
            [row["prompt"] for row in rows], images, self.rewards, columns, {"trainer_state": self.state}
        )
        found = call_rewards(self.rewards, samples, timeout=self.args.reward_timeout)
        warn_of_none(self.rewards, found)
        return found.values

    # ---- what is reported ----

    def _log_rollouts(self, batch: PictureRollouts, experience: Experience, mode: str) -> None:
        names = [reward.name for reward in self.rewards]
        everywhere, _ = gather_rows(torch.cat([batch.rewards[:, None], batch.values], 1), self.accelerator)
        found = {f"rewards/{name}/mean": everywhere[:, 1 + i] for i, name in enumerate(names)}
        found |= {"reward": everywhere[:, 0], "reward_std": group_std(batch.rewards.double(), batch.group)}
        if "advantages" in experience.signals:
            found["advantages/clipped"] = (experience.signals["advantages"].abs() >= self.args.advantage_clip).float()
        self.meters[mode].add(found)

    # ---- evaluation and pictures ----

    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> tuple[None, None, None]:
        """Sample pictures of a batch of prompts, and add their rewards to the evaluation's metrics."""
        each, (rows, _) = self.args.num_generations_eval, self.evaluated(inputs)
        if not rows:  # sampling needs no other process, so this one may skip it
            return None, None, None
        with self.averaged():
            batch = self.sample_pictures(rows, each, self.fixed_seeds(rows, each), self.evaluation_schedule())
        rewards = {f"rewards/{reward.name}/mean": batch.values[:, i] for i, reward in enumerate(self.rewards)}
        self.meters["eval"].add({"reward": batch.rewards, **rewards})
        return None, None, None

    def picture_rewards(self, rows: Sequence[Row], images: Tensor) -> Tensor:
        return self.combined(self.reward(rows, images), torch.arange(len(images)))
