"""Learning from samples of the model that is trained: one trainer, given an algorithm, an engine and reward functions.

    prompt ──engine──▶ completions ──reward functions──▶ rewards ──algorithm.advantages──▶ credit ──▶ steps of BaseTrainer

    trainer = OnlineTrainer(model, reward_funcs=short, args=OnlineConfig(...), train_dataset=prompts, algorithm=Mine())

An algorithm is a class with two methods, `advantages` and `loss`: see `trl.types.Algorithm`. The named trainers (GRPO,
RLOO, …) are this one with a configuration that makes theirs.

A round of samples comes when its first micro-batch is asked for. The sampler's log-probabilities stand for the policy that
sampled, so no second pass is needed; in a round that is trained on once, in one step, the ratio is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from trl.algorithms.advantages import combine_rewards, has_no_variance
from trl.algorithms.grpo import GRPO
from trl.algorithms.importance import mismatch
from trl.data.encode import EncodeSettings
from trl.errors import ConfigError
from trl.models.reference import FrozenModel, Reference, make_reference
from trl.models.score import prepare_scoring, score, unwrap
from trl.rewards.call import Rewarded, Samples, call_rewards, make_rewards
from trl.rollouts.engine import Prompt, Rollout, RolloutEngine
from trl.rollouts.experience import (
    Group,
    completions_of,
    cut_slices,
    example_of,
    experience_of,
    finished,
    offsets,
    with_signals,
    without_signals,
)
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.trainers.base import BaseTrainer, EvalRows, Rows
from trl.trainers.checkpoint import Part, Weights
from trl.trainers.completion_log import CompletionLog, log_rows, round_metrics
from trl.trainers.online_config import AVERAGING, OnlineConfig
from trl.trainers.preference import SyncRefModelCallback
from trl.trainers.prompts import Prompts, StreamRows, TableRows
from trl.trainers.rounds import Rounds, Slice
from trl.trainers.window import filler
from trl.types import Algorithm, Batch, Example, Experience, Metrics

NOT_FOR_REWARDS = ("prompt", "prompt_ids", "completion", "completion_ids")
"""Columns that reward functions are not given under their name."""


class OnlineTrainer(BaseTrainer):
    """Sample, reward, learn.

    reward_funcs                one or several of: a function `(prompts, completions, **columns) -> rewards`, async or
                                not; a reward model, or the name of one
    train_dataset               rows with `prompt`, a text or a conversation; other columns go to the reward functions
    reward_processing_classes   tokenizers of the reward models
    algorithm                   credit and loss; by default what the configuration describes
    engine                      where samples come from; by default the model itself, in process

    The other arguments are those of `BaseTrainer`.
    """

    config_class = OnlineConfig
    branches = True

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: OnlineConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        algorithm: Algorithm | None = None,
        engine: RolloutEngine | None = None,
        **keywords: Any,
    ) -> None:
        self.algorithm, self.engine = algorithm, engine
        self.reference: Reference | None = None
        self.completion_log = CompletionLog()
        self.rounds: Rounds | None = None
        self.samplings = {"train": 0, "eval": 0}
        self._columns: dict[str, list[str]] = {}
        self._fresh = True
        super().__init__(
            model,
            args,
            None,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **keywords,
        )
        weights = self.args.reward_weights
        self.rewards = make_rewards(reward_funcs, weights=weights, processing_classes=reward_processing_classes)
        self.data_collator = list

    @property
    def averaging(self) -> str:
        return AVERAGING[self.args.loss_aggregation]

    # ---- model and data ----

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        self.args.check_batches()
        self._has_new_adapter = peft_config is not None
        return super()._resolve_model(model, quantization_config, peft_config)

    def prepare_model(self) -> None:
        super().prepare_model()
        if self.algorithm is None:
            self.algorithm = self.args.make_algorithm()
        if self.engine is None:
            self.engine = LocalEngine(self.model, self.tokenizer_, progress=not self.args.disable_tqdm)
        if self.algorithm.needs_reference:
            self.reference = self._make_reference()
        self.parts.keep("rounds", Part(self._rounds_state, self._load_rounds), per_process=True)
        self.parts.keep("completions", self.completion_log, per_process=True, optional=True)
        if self.args.sync_ref_model and isinstance(self.reference, FrozenModel):
            self.parts.keep("reference", Weights(unwrap(self.reference.model)), per_process=self.is_sharded)

    def _make_reference(self) -> Reference:
        reference = make_reference(self.model, has_new_adapter=self._has_new_adapter)
        if isinstance(reference, FrozenModel):
            prepare_scoring(unwrap(reference.model))
            reference = FrozenModel(self.accelerator.prepare_model(reference.model, evaluation_mode=True))
        if self.args.sync_ref_model:
            if not isinstance(reference, FrozenModel):
                raise ConfigError(
                    "sync_ref_model moves the weights of a reference that has its own, but with an adapter it shares "
                    "the model's: train without an adapter, or set sync_ref_model=False."
                )
            self.add_callback(SyncRefModelCallback(reference.model))
        return reference

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
        self._columns[split] = rows.column_names or list(next(iter(rows)))
        return super().encode(rows, split, name)

    def _shuffled(self, rows: Rows) -> Rows:
        """A dataset is shuffled as prompts are taken."""
        return rows if isinstance(rows, Dataset) else super()._shuffled(rows)

    def get_train_dataloader(self) -> DataLoader:
        args, rank, world = self.args, self.args.process_index, self.args.world_size
        together = args.prompts_per_round * world
        if isinstance(self.train_dataset, Dataset):
            table = TableRows(self.train_dataset, seed=args.seed, shuffle=args.shuffle_dataset)
            self.prompts = Prompts(table, rank=rank, world=world)
            per_epoch = max(1, len(self.train_dataset) // together)
        else:
            self.prompts, per_epoch = Prompts(StreamRows(self.train_dataset), rank=rank, world=world), None
        self.samplings["train"] = 0
        self.rounds = Rounds(
            self.roll_out, slices=args.slices_per_round, iterations=args.num_iterations, per_epoch=per_epoch
        )
        return self.rounds.loader()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[list[Batch]], int]:
        self.take_up()  # before a round is sampled
        self._fresh = self.rounds.is_fresh
        return super().get_batch_samples(*args, **kwargs)

    # ---- a round ----

    def roll_out(self) -> list[Slice]:
        """The slices of a new round: sampled, rewarded, with credit."""
        self.engine.sync(self.model, self.state.global_step)
        groups = self._full_round()
        examples, experience = self.learn_from(groups, "train")
        self._log_round(groups, experience, "train")
        if self.args.is_on_policy:
            examples = without_signals(examples, ["old_logprobs"])
        return self.slices(examples, groups, experience, self.args.slices_per_round)

    def slices(
        self, examples: Sequence[Example], groups: Sequence[Group], experience: Experience, count: int
    ) -> list[Slice]:
        """What is learned from of a round, in `count` parts."""
        return cut_slices(examples, self.kept(groups, experience), count, self.token_budget())

    def _full_round(self) -> list[Group]:
        """As many groups as a round has; those without variance replaced by fresh prompts where that is asked for."""
        args = self.args
        groups = self.sample(self.prompts.take(args.prompts_per_round), args.num_generations, "train")
        if args.zero_variance != "resample":
            return groups
        for _ in range(args.max_resampling):
            missing = sum(map(self._is_flat, groups))
            most = int(self._gather(torch.tensor([missing], device=args.device)).max())
            if not most:
                break
            groups += self.sample(self.prompts.take(most)[:missing], args.num_generations, "train")
            groups.sort(key=self._is_flat)
            self._count("resampled_groups", missing, len(groups))
            groups = groups[: args.prompts_per_round]
        return groups

    def _is_flat(self, group: Group) -> bool:
        rewards = self._combined([group])
        return bool(has_no_variance(rewards, torch.zeros(len(rewards), dtype=torch.long)).all())

    def sample(self, rows: Sequence[Mapping[str, Any]], n: int, mode: str) -> list[Group]:
        """n completions of each row's prompt, rewarded."""
        prompts = [Prompt(row["prompt_ids"]) for row in rows]
        sampled = self.engine.generate(prompts, self.sampling_params(mode), n)
        shown = [self._shown(row, rollouts) for row, rollouts in zip(rows, sampled, strict=True)]
        extra: dict[str, Sequence[Any]] = {}
        rewarded = self.reward(rows, sampled, shown, mode, log_extra=extra.__setitem__)
        values, failed = rewarded.values.split(n), rewarded.failed.any(1).split(n)
        return [
            Group(
                row,
                example_of(row, rollouts),
                finished(rollouts),
                texts,
                values[i],
                failed[i],
                {name: list(column[i * n : (i + 1) * n]) for name, column in extra.items()},
            )
            for i, (row, rollouts, texts) in enumerate(zip(rows, sampled, shown, strict=True))
        ]

    def sampling_params(self, mode: str) -> SamplingParams:
        """How to sample next: every round and process has a seed of its own."""
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
        texts = [self.tokenizer_.decode(rollout.ids, skip_special_tokens=True) for rollout in rollouts]
        if isinstance(row["prompt"], str):
            return texts
        return [[{"role": "assistant", "content": text}] for text in texts]

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
        columns["completion_ids"] = [list(rollout.ids) for rollout in chain(*sampled)]
        extras = {
            "trainer_state": self.state,
            "log_extra": log_extra,
            "log_metric": lambda name, value: self._count(name, value, mode=mode),
        }
        samples = Samples([row["prompt"] for row in repeated], list(chain(*shown)), columns, extras)
        return call_rewards(self.rewards, samples, timeout=self.args.reward_timeout, on_error=self.args.on_reward_error)

    # ---- credit ----

    def learn_from(self, groups: Sequence[Group], mode: str) -> tuple[list[Example], Experience]:
        """Examples with all signals that the loss needs, and the experience that they come from."""
        examples = [group.example for group in groups]
        local = experience_of(examples, self._combined(groups))
        signals = {"old_logprobs": local.signals["sampler_logprobs"]}
        if self.reference is not None:
            signals["ref_logprobs"] = self.measure(examples, self._reference_logprobs)
        if mode == "train" and self.args.recompute_old_logprobs and not self.args.is_on_policy:
            signals["old_logprobs"] = self.measure(examples, self._logprobs)
        if self.algorithm.needs_values:
            signals["values"] = self.measure(examples, self._values)
        if isinstance(self.algorithm, GRPO) and self.algorithm.needs_entropy:
            signals["entropy"] = self.measure(examples, self._entropy)
        experience = self._with_credit(local.with_signals(**signals))
        added = {name: values for name, values in experience.signals.items() if name != "sampler_logprobs"}
        return with_signals(examples, added), experience

    def _combined(self, groups: Sequence[Group]) -> Tensor:
        """One reward `[N]` per completion, from those of all functions."""
        rewards = torch.cat([group.rewards for group in groups])
        sizes = torch.tensor([len(group.rewards) for group in groups])
        index = torch.arange(len(groups)).repeat_interleave(sizes)
        weights = torch.tensor([reward.weight for reward in self.rewards])
        total = combine_rewards(rewards, weights, index, aggregation=self.args.multi_objective_aggregation)
        if self.args.missing_eos_penalty is None:
            return total
        return total - self.args.missing_eos_penalty * ~torch.cat([group.finished for group in groups])

    def _with_credit(self, local: Experience) -> Experience:
        """The algorithm sees the round of all processes; its signals come back to each."""
        if self.accelerator.num_processes == 1:
            return self.algorithm.advantages(local)
        whole, start = self._gathered(local)
        found = self.algorithm.advantages(whole).signals
        here = slice(start, start + len(local.rewards))
        width = local.mask.shape[1]
        return local.with_signals(**{k: v[here] if v.dim() == 1 else v[here, :width] for k, v in found.items()})

    def _gathered(self, local: Experience) -> tuple[Experience, int]:
        """The experience of all processes, and where this one's begins. Every process has as many completions."""
        device = self.args.device

        def gather(values: Tensor) -> Tensor:
            values = values.to(device)
            if values.dim() == 2:
                values = self.accelerator.pad_across_processes(values, dim=1)
            return self.accelerator.gather(values.contiguous()).cpu()

        group = local.group + self.args.process_index * (int(local.group.max()) + 1)
        signals = {name: gather(values) for name, values in sorted(local.signals.items())}
        whole = Experience(gather(local.rewards), gather(group), gather(local.mask), signals)
        return whole, self.args.process_index * len(local.rewards)

    @torch.no_grad()
    def measure(self, examples: Sequence[Example], numbers: Callable[[Batch], Tensor]) -> Tensor:
        """`[N,C]` numbers of the round's completions, by `numbers(batch)`, a micro-batch at a time."""
        groups = self._plan(examples, 1)
        most = int(self._gather(torch.tensor([len(groups)], device=self.args.device)).max())
        first = offsets(examples)
        width = max(1, *(len(c) for c in completions_of(examples)))
        table = torch.zeros(sum(len(e.completions) for e in examples), width)
        for k in range(most):
            group = groups[min(k, len(groups) - 1)]
            batch = self.lay_out([examples[i] for i in group])
            batch = batch if k < len(groups) else filler(replace(batch, weight=batch.mask))
            with self.compute_loss_context_manager():
                found = numbers(batch.to(self.args.device)).float().cpu()
            if k < len(groups):
                rows = [first[i] + j for i in group for j in range(len(examples[i].completions))]
                table[torch.tensor(rows), : found.shape[1]] = found
        return table

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        return self.reference.logprobs(self.model_wrapped, batch, temperature=self._temperature)

    def _logprobs(self, batch: Batch) -> Tensor:
        return score(self.model_wrapped, batch, temperature=self._temperature).logprobs

    def _values(self, batch: Batch) -> Tensor:
        return score(self.model_wrapped, batch, temperature=self._temperature, want={"value"}).value

    def _entropy(self, batch: Batch) -> Tensor:
        return score(self.model_wrapped, batch, temperature=self._temperature, want={"entropy"}).entropy

    @property
    def _temperature(self) -> float:
        """Greedy samples (0) are scored at temperature 1."""
        return self.args.temperature or 1.0

    def kept(self, groups: Sequence[Group], experience: Experience) -> list[bool]:
        """Which completions are learned from."""
        keep = ~torch.cat([group.failed for group in groups])
        if self.args.mask_truncated_completions:
            keep &= torch.cat([group.finished for group in groups])
        if self.args.zero_variance == "drop":
            keep &= ~has_no_variance(experience.rewards, experience.group)
        return keep.tolist()

    # ---- loss ----

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        want = {"entropy", "value"} if self.algorithm.needs_values else {"entropy"}
        scores = score(model, batch, temperature=self._temperature, want=want)
        on_policy = "old_logprobs" not in batch.signals
        if on_policy:
            batch = replace(batch, signals={**batch.signals, "old_logprobs": scores.logprobs.detach()})
        loss, metrics = self.algorithm.loss(scores, batch)
        if on_policy or self._fresh:
            metrics |= mismatch(scores.logprobs.detach(), batch.signals["sampler_logprobs"], batch.mask)
        loss = loss[:, None].expand_as(batch.mask) if loss.dim() == 1 else loss
        return loss * self._length_scale(batch), metrics

    def _length_scale(self, batch: Batch) -> Tensor | float:
        """What turns the mean over a completion's tokens into their sum, or their sum over a constant."""
        if self.args.loss_aggregation not in ("constant", "sum"):
            return 1.0
        lengths = batch.mask.sum(-1, keepdim=True)
        return lengths / self._completion_limit() if self.args.loss_aggregation == "constant" else lengths

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: list[Mapping[str, Any]], *_: Any, **__: Any
    ) -> tuple[None, None, None]:
        """Sample completions of a batch of prompts, and count their rewards and loss."""
        self.engine.sync(self.model, self.state.global_step)
        groups = self.sample(inputs, self.args.num_generations_eval or self.args.num_generations, "eval")
        examples, experience = self.learn_from(groups, "eval")
        self._log_round(groups, experience, "eval")
        (examples,) = self.slices(without_signals(examples, ["old_logprobs"]), groups, experience, 1)
        for group in self._plan(examples, 1):
            self.evaluate_batch(model, [examples[i] for i in group], {})
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.samplings["eval"] = 0
        return super().evaluation_loop(*args, **kwargs)

    # ---- what is reported ----

    def _count(self, name: str, amount: float, per: float = 1.0, mode: str = "train") -> None:
        self.meters[mode].count(name, float(amount), per=float(per))

    def _log_round(self, groups: Sequence[Group], experience: Experience, mode: str) -> None:
        names = [reward.name for reward in self.rewards]
        self.meters[mode].add(round_metrics(groups, experience, names))
        if mode == "train" and self.args.log_completions:
            self.completion_log.add(log_rows(groups, experience, names))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        args = self.args
        if "loss" in logs and args.log_completions and self.is_world_process_zero():
            folder = Path(args.output_dir) / "completions"
            self.completion_log.flush(
                folder, self.state.global_step, show=args.num_completions_to_print, unique=args.log_unique_prompts
            )

    # ---- checkpoints ----

    def _rounds_state(self) -> dict[str, Any]:
        """Where sampling and training stand, and the samples that are still to be learned from."""
        return {"rounds": self.rounds.state(), "cursor": self.prompts.cursor, "samplings": self.samplings["train"]}

    def _load_rounds(self, state: Mapping[str, Any]) -> None:
        self.prompts.cursor, self.samplings["train"] = state["cursor"], state["samplings"]
        if not self.args.ignore_data_skip:
            self.rounds.load_state(state["rounds"])
