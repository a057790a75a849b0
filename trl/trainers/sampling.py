"""The first half of an online method: prompts in, samples with rewards out.

    row ──encode──▶ prompt ──engine.generate──▶ G completions ──reward functions──▶ Group

A group is all samples of one prompt. It stays whole on one process: every process takes prompts of its own, and samples
and rewards all of their completions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import Image
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from trl.algorithms.advantages import SUM_THEN_NORMALIZE, RewardAggregation, combine_rewards, has_no_variance
from trl.callbacks.completions import (
    CompletionLog,
    LoggedMetrics,
    log_rows,
    means_of,
    one_per_prompt,
    rollout_metrics,
    write_completions,
)
from trl.data.encode import EncodeSettings
from trl.data.multimodal import IMAGES
from trl.errors import ConfigError
from trl.models.score import unwrap
from trl.rewards.call import Rewarded, Samples, call_rewards, check_columns, check_weights, make_rewards
from trl.rewards.model import RewardModel
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine, Unexpanded
from trl.rollouts.experience import Group, example_of, finished
from trl.rollouts.function import rollouts_of
from trl.rollouts.local import LocalEngine
from trl.rollouts.prompts import Prompts
from trl.rollouts.sampling import SamplingParams
from trl.trainers.arguments import Rows
from trl.trainers.base import BaseTrainer
from trl.trainers.online_config import OnlineConfig
from trl.training.collectives import all_gather_object, gather_rows
from trl.types import Example, Experience
from trl.vision.places import collapsed_ids

logger = logging.getLogger(__name__)

RolloutFunction = Callable[[list[Any], Any], Mapping[str, Any]]
"""`rollout_func(prompts, trainer)`: see `trl.rollouts.function`."""

NOT_FOR_REWARDS = ("prompt", "prompt_ids", "completion", "completion_ids")
"""Columns that reward functions are not given under their name."""


class SamplingTrainer(BaseTrainer):
    """Sample and reward: what `OnlineTrainer` learns from. Its arguments are described there."""

    config_class = OnlineConfig
    args: OnlineConfig
    prompts_only = True
    multiple_completions = True

    def __init__(
        self,
        *arguments: Any,
        reward_funcs: Any = None,
        reward_processing_classes: Any = None,
        engine: RolloutEngine | None = None,
        rollout_func: RolloutFunction | None = None,
        **keywords: Any,
    ) -> None:
        self.engine, self.rollout_func = engine, rollout_func
        self.prompts: Prompts | None = None
        self.completion_log, self.eval_completions = CompletionLog(), CompletionLog()
        self.logged = {"train": LoggedMetrics(), "eval": LoggedMetrics()}
        self.samplings = {"train": 0, "eval": 0}
        self._columns: dict[str, list[str]] = {}
        self._said_none = False
        self._reward_funcs = reward_funcs
        super().__init__(*arguments, **keywords)
        weights = self.args.reward_weights
        reward_funcs = self._given_rewards(reward_funcs)
        self.rewards = make_rewards(reward_funcs, weights=weights, processing_classes=reward_processing_classes)
        for columns in self._columns.values() if rollout_func is None else ():  # which may give further columns
            check_columns(self.rewards, [name for name in columns if name not in NOT_FOR_REWARDS])
        for reward in self.rewards:
            if isinstance(reward.function, RewardModel):
                reward.function.to(self.args.device)
        self.data_collator = list

    def _resolve_model(self, *arguments: Any) -> nn.Module:
        check_weights(self._given_rewards(self._reward_funcs), self.args.reward_weights)
        if self.engine is None:
            self.args.check_installed()
        return super()._resolve_model(*arguments)

    def prepare_model(self) -> None:
        super().prepare_model()
        if self.engine is None:
            shown = self.is_local_process_zero() and not self.args.disable_tqdm
            self.engine = self.args.make_engine(self.model, self.processing_class, progress=shown)
        if not isinstance(self.engine, RolloutEngine):
            raise ConfigError(
                f"engine is a {type(self.engine).__name__}, which does not have all that a trainer asks of it: derive the "
                "class from trl.RolloutEngine, and give it the methods generate and sync."
            )
        if isinstance(self.engine, LocalEngine):
            self.engine.image_features = self.image_features
        self.states.register("completions", self.completion_log, per_rank=True, optional=True)
        self.states.register("logged", self.logged["train"], per_rank=True, optional=True)

    def _given_rewards(self, reward_funcs: Any) -> Any:
        """The reward functions that were given, by whichever argument or option."""
        return reward_funcs

    def rows_as_text(self, n: int = 4) -> list[dict[str, Any]]:
        """No rows: the report shows prompts beside the completions that were sampled."""
        return []

    # ---- prompts ----

    def encode_settings(self, split: str) -> EncodeSettings:
        return EncodeSettings(
            kind="prompt_only",
            max_prompt_length=self.args.max_prompt_length,
            chat_template_kwargs=self.args.chat_template_kwargs,
            keep_columns=tuple(self._columns[split]),
            encoder_decoder=unwrap(self.model).config.is_encoder_decoder,
            num_proc=self.args.dataset_num_proc,
        )

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        columns = self._columns[split] = rows.column_names or list(next(iter(rows)))
        if "input_ids" not in columns or "prompt" in columns:
            return super().encode(rows, split, name)
        self._columns[split] = [*columns, "prompt"]
        rows = rows.map(lambda row: {"prompt": self.tokenizer.decode(row["input_ids"], skip_special_tokens=True)})
        limit = self.args.max_prompt_length or 0
        return super().encode(rows, split, name).map(lambda row: {"prompt_ids": row["input_ids"][-limit:]})

    def _shuffled(self, rows: Rows) -> Rows:
        """The rows: those of a dataset are shuffled later, when prompts are taken from it."""
        return rows if isinstance(rows, Dataset) else super()._shuffled(rows)

    # ---- samples ----

    def sample_rollout_batch(self) -> list[Group]:
        """As many groups as a rollout batch has; those without variance replaced by fresh prompts where that is asked for."""
        args = self.args
        groups = self.sample(self.prompts.take(args.prompts_per_rollout_batch), args.num_generations, "train")
        if args.zero_variance != "resample":
            return groups
        for _ in range(args.max_resampling):
            missing = torch.tensor([sum(map(self._is_flat, groups))], device=args.device)
            everywhere = self._gather(missing).tolist()
            if not any(everywhere):
                break
            groups += self.sample(self.prompts.deal(everywhere), args.num_generations, "train")
            groups.sort(key=self._is_flat)
            self._count("resampled_groups", missing.item(), len(groups))
            groups = groups[: args.prompts_per_rollout_batch]
        return groups

    def _is_flat(self, group: Group) -> bool:
        rewards = self._combined([group])
        return bool(has_no_variance(rewards, torch.zeros(len(rewards), dtype=torch.long)).all())

    def sample(self, rows: Sequence[Mapping[str, Any]], n: int, mode: str) -> list[Group]:
        """n completions of each row's prompt, rewarded."""
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

    def _sampled(
        self, rows: Sequence[Mapping[str, Any]], n: int, mode: str
    ) -> tuple[list[Example], list[list[Rollout]]]:
        """The rows' prompts, and n rollouts of each: by the engine, or by the user's function."""
        prompts = self.prompts_of(rows)
        if self.rollout_func is None:
            asked = [self._asked(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]
            return prompts, self.engine.generate(asked, self.sampling_params(mode), n)
        if not rows:
            return [], []
        found = self.rollout_func([row["prompt"] for row in rows for _ in range(n)], self)
        ids, sampled = rollouts_of(found, len(rows), n, self._end_tokens(), self.state.global_step)
        return [replace(prompt, prompt=own) for prompt, own in zip(prompts, ids, strict=True)], sampled

    def _asked(self, row: Mapping[str, Any], example: Example) -> Prompt:
        """The prompt as the engine takes it: with its images, for engines that read them themselves."""
        prompt, images = Prompt.of(example), row.get(IMAGES)
        if self.images is None or self.engine.is_policy or not images:
            return prompt
        ids = collapsed_ids(self.images, example.prompt, images)
        return replace(prompt, unexpanded=Unexpanded(ids, self.images.read(images)))

    def _end_tokens(self) -> set[int]:
        eos = unwrap(self.model).generation_config.eos_token_id
        return {*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id}

    def prompts_of(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """The rows' prompts with all that the model reads of them, without completions."""
        return self.to_examples(rows)

    def sampling_params(self, mode: str) -> SamplingParams:
        """How to sample next: every rollout batch and process has a seed of its own."""
        number = self.samplings[mode] * self.args.world_size + self.args.process_index
        self.samplings[mode] += 1
        seed = (2 * self.args.seed + (mode == "eval")) * 2**40 + number
        return self.args.sampling_params(max_new_tokens=self._completion_limit(), seed=seed)

    def _completion_limit(self) -> int:
        if self.args.max_completion_length is not None:
            return self.args.max_completion_length
        return unwrap(self.model).config.get_text_config().max_position_embeddings

    def _shown(self, row: Mapping[str, Any], rollouts: Sequence[Rollout]) -> list[Any]:
        """Completions as reward functions see them: texts, or a conversation's next message."""
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
        """Rewards of all samples, by every function. A function may log columns and numbers of its own."""
        if not rows:
            return Rewarded(torch.zeros(0, len(self.rewards)), torch.zeros(0, len(self.rewards), dtype=torch.bool))
        repeated = [row for row, rollouts in zip(rows, sampled, strict=True) for _ in rollouts]
        names = [name for name in rows[0] if name not in NOT_FOR_REWARDS]
        columns = {name: [row[name] for row in repeated] for name in names}
        if self.images is not None:
            columns[IMAGES] = list(chain.from_iterable(self._images(rows, sampled)))
        told = list(chain(*sampled))
        columns |= {name: [rollout.info.get(name) for rollout in told] for name in told[0].info}
        columns["completion_ids"] = [list(rollout.ids) for rollout in chain(*sampled)]
        samples = Samples(
            [row["prompt"] for row in repeated], list(chain(*shown)), columns, self._extras(mode, log_extra)
        )
        args = self.args
        found = call_rewards(self.rewards, samples, timeout=args.reward_timeout, on_error=args.on_reward_error)
        if (none := int((found.values.isnan().all(1) & ~found.failed.any(1)).sum())) and not self._said_none:
            self._said_none = True
            names = ", ".join(reward.name for reward in self.rewards)
            logger.warning(
                f"{none} of {len(samples)} completions got no reward: {names} gave None for them, so nothing is learned from "
                "them. A function gives None where it does not apply; one of them should. This is said once."
            )
        return found

    def _images(
        self, rows: Sequence[Mapping[str, Any]], sampled: Sequence[Sequence[Rollout]]
    ) -> Iterator[list[list[Image]]]:
        """The images of each row, decoded once for all its completions."""
        for row, rollouts in zip(rows, sampled, strict=True):
            yield [self.images.read(row[IMAGES])] * len(rollouts)

    def _extras(self, mode: str, log_extra: Callable[[str, Sequence[Any]], None]) -> dict[str, Any]:
        """What reward functions are given beside columns."""
        return {"trainer_state": self.state, "log_extra": log_extra, "log_metric": self.logged[mode].add}

    def _combined(self, groups: Sequence[Group], aggregation: RewardAggregation | None = None) -> Tensor:
        """One reward `[N]` per completion, from those of all functions, combined as the options say or by `aggregation`."""
        rewards = torch.cat([group.rewards for group in groups])
        sizes = torch.tensor([len(group.rewards) for group in groups])
        index = torch.arange(len(groups)).repeat_interleave(sizes)
        weights = torch.tensor([reward.weight for reward in self.rewards])
        aggregation = aggregation or self.args.multi_objective_aggregation
        total = combine_rewards(rewards, weights, index, aggregation=aggregation)
        if self.args.missing_eos_penalty is None:
            return total
        return total - self.args.missing_eos_penalty * ~torch.cat([group.finished for group in groups])

    # ---- what is reported ----

    def _count(self, name: str, amount: float, per: float = 1.0, mode: str = "train") -> None:
        self.meters[mode].count(name, float(amount), per=float(per))

    def _log_rollouts(self, groups: Sequence[Group], experience: Experience, mode: str) -> None:
        names = [reward.name for reward in self.rewards]
        if (
            self.args.multi_objective_aggregation != SUM_THEN_NORMALIZE
        ):  # log what functions gave, not what is made of it
            experience = replace(experience, rewards=self._combined(groups, SUM_THEN_NORMALIZE))
        everywhere = self._gather_rewards(groups, experience)
        self.meters[mode].add(rollout_metrics(groups, experience, names, everywhere))
        if self.args.log_completions:
            log = self.completion_log if mode == "train" else self.eval_completions
            log.add(log_rows(groups, experience, names))

    def _gather_rewards(self, groups: Sequence[Group], experience: Experience) -> Tensor:
        """`[M,1+F]`: the combined reward and that of every function, of all samples of all processes."""
        functions = torch.cat([group.rewards for group in groups])
        return gather_rows(torch.cat([experience.rewards[:, None], functions], 1), self.accelerator)[0]

    def _train_metrics(self) -> dict[str, float]:
        return {**super()._train_metrics(), **self._logged_by_rewards("train"), **self.engine.take_metrics()}

    def _logged_by_rewards(self, mode: str) -> dict[str, float]:
        return means_of(all_gather_object(self.logged[mode].take(), self.accelerator))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs and self.args.log_completions:
            self._write_completions(self.completion_log)

    def _write_completions(self, log: CompletionLog, kind: str = "") -> None:
        """Write the completions of all processes, on the main one; those of an evaluation to a folder of their own, `kind`."""
        args = self.args
        rows = list(chain(*all_gather_object(log.take(), self.accelerator)))
        if self.is_world_process_zero():
            rows = one_per_prompt(rows) if args.log_unique_prompts else rows
            folder = Path(args.output_dir) / "completions" / kind
            show, trackers = args.num_completions_to_print, args.report_to
            write_completions(rows, folder, self.state.global_step, show=show, trackers=trackers)

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self.samplings["eval"] = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self._logged_by_rewards("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        if self.args.log_completions:
            self._write_completions(self.eval_completions, metric_key_prefix)
        return output
