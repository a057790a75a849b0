"""The sampling half of online training: from prompts to groups of completions with rewards.

    row ──encode──▶ prompt ──engine.generate──▶ G completions ──reward functions──▶ Group

A group is all completions of one prompt. Every process takes different prompts, and samples and rewards all of their
completions itself, so a group is never split over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState

from trl.algorithms.advantages import RewardAggregation, combine_rewards, has_no_variance
from trl.callbacks.completions import LoggedMetrics
from trl.data.multimodal import IMAGES
from trl.errors import ConfigError
from trl.rewards.call import Rewarded, call_rewards, warn_of_none
from trl.rewards.model import RewardModel
from trl.rewards.reward import Reward, Samples, check_columns, make_rewards
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine, Unexpanded
from trl.rollouts.experience import Group, example_of, finished
from trl.rollouts.function import check_logprobs, rollouts_of
from trl.rollouts.sampling import SamplingParams
from trl.trainers.online_config import OnlineConfig
from trl.types import Example
from trl.vision.places import collapsed_ids
from trl.vision.processing import ImageProcessing

NOT_FOR_REWARDS = ("prompt", "prompt_ids", "completion", "completion_ids")
"""Columns of a dataset that are not passed to reward functions as keywords of the same name."""


@dataclass
class GroupSampler:
    """Generates completions of prompts with an engine, and calls the reward functions on them.

    args           options of sampling, and how rewards are combined
    policy         the model that is trained; its configuration has the EOS tokens and the context length
    images         reads the images of rows; None for models that read text alone
    to_examples    turns encoded rows into prompts with all inputs of the model
    engine         returns the current engine
    state          returns the trainer's state, for the reward functions
    rollout_func   `(prompts) -> rollouts` in place of the engine: see `trl.rollouts.function`
    """

    args: OnlineConfig
    policy: PreTrainedModel
    tokenizer: Any
    images: ImageProcessing | None
    to_examples: Callable[[Sequence[Mapping[str, Any]]], list[Example]]
    engine: Callable[[], RolloutEngine]
    rewards: Sequence[Reward]
    state: Callable[[], TrainerState]
    rollout_func: Callable[[list[Any]], Mapping[str, Any]] | None = None
    logged: dict[str, LoggedMetrics] = field(
        default_factory=lambda: {"train": LoggedMetrics(), "eval": LoggedMetrics()}
    )
    """Numbers that reward functions log by name, by mode."""
    samplings: dict[str, int] = field(default_factory=lambda: {"train": 0, "eval": 0})
    """Number of samplings so far, by mode; the seed of the next one is made from it."""

    def groups(self, rows: Sequence[Mapping[str, Any]], n: int, mode: str) -> list[Group]:
        """Sample n completions of each row's prompt and reward them. `mode` is "train" or "eval"."""
        prompts, sampled = self._sampled(rows, n, mode)
        shown = [self._shown(row, rollouts) for row, rollouts in zip(rows, sampled, strict=True)]
        extra: dict[str, Sequence[Any]] = {}
        rewarded = self.reward(rows, sampled, shown, mode, log_extra=extra.__setitem__)
        values, failed = rewarded.values.split(n), rewarded.failed.any(1).split(n)
        return [
            Group(
                row,
                example_of(prompts[i], rollouts),
                finished(rollouts),
                texts,
                values[i],
                failed[i],
                {name: list(column[i * n : (i + 1) * n]) for name, column in extra.items()},
            )
            for i, (row, rollouts, texts) in enumerate(zip(rows, sampled, shown, strict=True))
        ]

    # ---- samples ----

    def _sampled(
        self, rows: Sequence[Mapping[str, Any]], n: int, mode: str
    ) -> tuple[list[Example], list[list[Rollout]]]:
        """The rows' prompts, and n rollouts of each from the engine or from `rollout_func`."""
        prompts = self.to_examples(rows)
        if self.rollout_func is None:
            asked = [self._asked(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
            return prompts, self.engine().generate(asked, self._sampling_params(mode), n)
        if not rows:
            return [], []
        found = self.rollout_func([row["prompt"] for row in rows for _ in range(n)])
        ids, sampled = rollouts_of(found, len(rows), n, self._end_tokens(), self.state().global_step)
        if self.args.reads_sampler_logprobs:
            check_logprobs(list(chain(*sampled)))
        return [replace(prompt, prompt=own) for prompt, own in zip(prompts, ids, strict=True)], sampled

    def _asked(self, row: Mapping[str, Any], example: Example) -> Prompt:
        """The prompt for the engine; engines that process images themselves get unexpanded tokens and the images."""
        prompt, images = Prompt.of(example), row.get(IMAGES)
        if self.images is None or self.engine().is_policy or not images:
            return prompt
        ids = collapsed_ids(self.images, example.prompt, images)
        return replace(prompt, unexpanded=Unexpanded(ids, self.images.read(images)))

    def _end_tokens(self) -> set[int]:
        eos = self.policy.generation_config.eos_token_id
        return {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id}

    def _sampling_params(self, mode: str) -> SamplingParams:
        """Parameters of the next sampling, with a different seed in every rollout batch and process."""
        number = self.samplings[mode] * self.args.world_size + self.args.process_index
        self.samplings[mode] += 1
        seed = (2 * self.args.seed + (mode == "eval")) * 2**40 + number
        return self.args.sampling_params(max_new_tokens=self.completion_limit, seed=seed)

    @property
    def completion_limit(self) -> int:
        """Most tokens of a completion."""
        if self.args.max_completion_length is not None:
            return self.args.max_completion_length
        return self.policy.config.get_text_config().max_position_embeddings

    def _shown(self, row: Mapping[str, Any], rollouts: Sequence[Rollout]) -> list[Any]:
        """Completions as reward functions receive them: texts, or for conversations a list of one assistant message each."""
        texts = [self.tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in rollouts]
        if isinstance(row["prompt"], str):
            return texts
        return [[{"role": "assistant", "content": text}] for text in texts]

    # ---- rewards ----

    def reward(
        self,
        rows: Sequence[Mapping[str, Any]],
        sampled: Sequence[Sequence[Rollout]],
        shown: Sequence[Sequence[Any]],
        mode: str,
        log_extra: Callable[[str, Sequence[Any]], None],
    ) -> Rewarded:
        """Call every reward function on all completions. `log_extra` takes the columns that a function logs."""
        if not rows:
            return Rewarded(torch.zeros(0, len(self.rewards)), torch.zeros(0, len(self.rewards), dtype=torch.bool))
        repeated = [row for row, rollouts in zip(rows, sampled, strict=True) for _ in rollouts]
        told = list(chain(*sampled))
        columns = {name: [row[name] for row in repeated] for name in rows[0] if name not in NOT_FOR_REWARDS}
        if self.images is not None:  # decoded once for all completions of a row
            read = (self.images.read(row[IMAGES]) for row in rows)
            columns[IMAGES] = [images for images, own in zip(read, sampled, strict=True) for _ in own]
        columns |= {name: [rollout.info.get(name) for rollout in told] for name in told[0].info}
        columns["completion_ids"] = [list(rollout.ids) for rollout in told]
        extras = {"trainer_state": self.state(), "log_extra": log_extra, "log_metric": self.logged[mode].add}
        samples = Samples([row["prompt"] for row in repeated], list(chain(*shown)), columns, extras)
        args = self.args
        found = call_rewards(self.rewards, samples, timeout=args.reward_timeout, on_error=args.on_reward_error)
        warn_of_none(self.rewards, found)
        return found

    def combined(self, groups: Sequence[Group], aggregation: RewardAggregation | None = None) -> Tensor:
        """Combine the rewards of all functions into one per completion, `[N]`, by the options or by `aggregation`."""
        rewards = torch.cat([group.rewards for group in groups])
        sizes = torch.tensor([len(group.rewards) for group in groups])
        index = torch.arange(len(groups)).repeat_interleave(sizes)
        weights = torch.tensor([reward.weight for reward in self.rewards])
        aggregation = aggregation or self.args.multi_objective_aggregation
        total = combine_rewards(rewards, weights, index, aggregation=aggregation)
        if self.args.missing_eos_penalty is None:
            return total
        return total - self.args.missing_eos_penalty * ~torch.cat([group.finished for group in groups])

    def is_flat(self, group: Group) -> bool:
        """Whether the combined rewards of a group are all equal."""
        rewards = self.combined([group])
        return bool(has_no_variance(rewards, torch.zeros(len(rewards), dtype=torch.long)).all())


def engine_for(
    args: OnlineConfig, given: RolloutEngine | None, model: nn.Module, processor: Any, *, progress: bool
) -> RolloutEngine:
    """The engine that was given, or the one that the options ask for. Raises ConfigError if it is no `RolloutEngine`."""
    engine = args.make_engine(model, processor, progress=progress) if given is None else given
    if not isinstance(engine, RolloutEngine):
        raise ConfigError(
            f"engine is a {type(engine).__name__}, which lacks methods that the trainer calls: derive the "
            "class from trl.RolloutEngine, and define its methods generate and sync."
        )
    return engine


def rewards_for(
    args: OnlineConfig, given: Any, columns: Iterable[Sequence[str]], *, processing_classes: Any
) -> list[Reward]:
    """Make the reward functions from what the trainer was given, and move reward models to its device.

    `columns`: the column names of each dataset. Raises ConfigError if a function needs a column that one of them lacks.
    """
    rewards = make_rewards(given, weights=args.reward_weights, processing_classes=processing_classes)
    for names in columns:
        check_columns(rewards, [name for name in names if name not in NOT_FOR_REWARDS])
    for reward in rewards:
        if isinstance(reward.function, RewardModel):
            reward.function.to(args.device)
    return rewards
