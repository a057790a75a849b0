"""Learning from samples of the model that is trained: one trainer, given an algorithm, an engine and reward functions.

    prompt ──engine──▶ completions ──reward functions──▶ rewards ──algorithm.advantages──▶ advantages ──▶ optimizer steps

    trainer = OnlineTrainer(model, reward_funcs=short, args=OnlineConfig(...), train_dataset=prompts, algorithm=Mine())

An algorithm is a class with two methods, `advantages` and `loss`: see `trl.types.Algorithm`. The named trainers (GRPO,
RLOO, …) are this one with a configuration that makes theirs.

A rollout batch comes when its first micro-batch is asked for. The sampler's log-probabilities stand for the policy that
sampled, so no second pass is needed; in a rollout batch that is trained on once, in one step, the ratio is exactly 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from trl.algorithms.advantages import has_no_variance
from trl.algorithms.importance import Correction, mismatch
from trl.compat import SAMPLER
from trl.data.encode import EncodeSettings
from trl.errors import ConfigError, EngineError
from trl.models.reference import FrozenModel, Reference
from trl.models.score import score, unwrap
from trl.rewards.call import Reward, check_weights
from trl.rollouts.buffer import Minibatch, RolloutBuffer
from trl.rollouts.engine import RolloutEngine
from trl.rollouts.experience import (
    Group,
    completions_of,
    empty_group,
    experience_of,
    split_into_minibatches,
    tables_of,
    with_signals,
    without_signals,
)
from trl.rollouts.local import LocalEngine
from trl.rollouts.prompts import Prompts
from trl.trainers.arguments import EvalRows, OnlineKeywords, Rows
from trl.trainers.attributes import OnlineAttributes
from trl.trainers.base import BaseTrainer
from trl.trainers.entropy_bonus import BonusOfSteps, HasEntropyBonus, count_tokens
from trl.trainers.online_config import AVERAGING, OnlineConfig
from trl.trainers.prompt_room import warn_of_short_room
from trl.trainers.reference import reference_for, reference_models, score_signals, sync_callbacks
from trl.trainers.rollout_log import RolloutLog
from trl.trainers.sampling import GroupSampler, engine_for, rewards_for
from trl.training.collectives import advantages_over_ranks
from trl.training.parallel import unduplicated_rows
from trl.training.state import StateFunctions
from trl.types import Algorithm, Batch, Example, Experience, Metrics, Scores

RolloutFunction = Callable[[list[Any], Any], Mapping[str, Any]]
"""`rollout_func(prompts, trainer)`: see `trl.rollouts.function`."""


class OnlineTrainer(OnlineAttributes, BaseTrainer):
    """Base of the online trainers: sample completions of prompts, reward them, learn from them.

    reward_funcs                one or several of: a function `(prompts, completions, **columns) -> rewards`, async or
                                not; a reward model, or the name of one
    train_dataset               rows with `prompt`, a text or a conversation; other columns go to the reward functions
    reward_processing_classes   tokenizers of the reward models
    algorithm                   advantages and loss; by default what the configuration describes
    engine                      where samples come from; by default as the configuration says: the model itself, in process
    rollout_func                makes rollouts in place of the engine: see `trl.rollouts.function`
    reference                   the reference policy, a model or its name; by default the model as it is given

    The other arguments are those of `BaseTrainer`.
    """

    config_class = OnlineConfig
    args: OnlineConfig
    ref_model: Any = None
    prompts_only = True
    multiple_completions = True
    captures_unasked = False  # graphs would hold memory that samples need
    sampler_class: ClassVar[type[GroupSampler]] = GroupSampler
    uncalled = SAMPLER

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
        reference: str | nn.Module | None = None,
        rollout_func: RolloutFunction | None = None,
        **keywords: Unpack[OnlineKeywords],
    ) -> None:
        self.algorithm, self.engine = algorithm, engine
        self.reference: Reference | None = None
        self._given_reference = reference
        self.buffer: RolloutBuffer | None = None
        self.entropy_bonus: BonusOfSteps | None = None
        self._is_new_batch = True
        self._columns: dict[str, list[str]] = {}
        self._reward_funcs = reward_funcs
        self._reads_prompts = rollout_func is None
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
        self._prepare_sampling(reward_processing_classes, rollout_func)
        self.data_collator = list

    @property
    def rewards(self) -> Sequence[Reward]:
        """The reward functions."""
        return self.sampler.rewards

    @property
    def averaging(self) -> str:
        return AVERAGING[self.args.loss_aggregation]

    # ---- model and data ----

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        self.args.check_batches()
        check_weights(self._given_rewards(self._reward_funcs), self.args.reward_weights)
        if self.engine is None:
            self.args.check_installed()
        self._has_new_adapter = peft_config is not None
        return super()._resolve_model(model, quantization_config, peft_config)

    def _given_rewards(self, reward_funcs: Any) -> Any:
        """The reward functions that were given, by whichever argument or option."""
        return reward_funcs

    def prepare_model(self) -> None:
        super().prepare_model()
        shown = self.is_local_process_zero() and not self.args.disable_tqdm
        self.engine = engine_for(self.args, self.engine, self.model, self.processing_class, progress=shown)
        if isinstance(self.engine, LocalEngine):
            self.engine.image_features = self.image_features
        self._prepare_algorithm()
        self.states.register("rollouts", StateFunctions(self._buffer_state, self._load_buffer), per_rank=True)
        self.states.register("algorithm", StateFunctions(self._algorithm_state, self._load_algorithm), optional=True)
        if self.entropy_bonus is not None:
            self.states.register("entropy", self.entropy_bonus)
        self.keep_reference(self.reference, moves=self.args.sync_ref_model)

    def _prepare_sampling(self, reward_processing_classes: Any, rollout_func: RolloutFunction | None) -> None:
        """Make rewards and sampler, and what their numbers are reported by."""
        columns = [] if rollout_func is not None else self._columns.values()  # a function may give further ones
        given = self._given_rewards(self._reward_funcs)
        rewards = rewards_for(self.args, given, columns, processing_classes=reward_processing_classes)
        self.sampler = self.sampler_class(
            self.args,
            unwrap(self.model),
            self.tokenizer,
            self.images,
            self.to_examples,
            lambda: self.engine,
            rewards,
            state=lambda: self.state,
            rollout_func=None if rollout_func is None else lambda prompts: rollout_func(prompts, self),
        )
        self.rollout_logs = {
            mode: RolloutLog(self.sampler, mode, meter, self.accelerator) for mode, meter in self.meters.items()
        }
        self.states.register("completions", self.rollout_logs["train"].completions, per_rank=True, optional=True)
        self.states.register("logged", self.sampler.logged["train"], per_rank=True, optional=True)

    def _prepare_algorithm(self) -> None:
        if self.algorithm is None:
            self.algorithm = self.args.make_algorithm()
        if not isinstance(self.algorithm, Algorithm):
            raise ConfigError(
                f"algorithm is a {type(self.algorithm).__name__}, which does not say all that a trainer asks of it: derive "
                "the class from trl.types.Algorithm, and give it the methods advantages and loss."
            )
        if self.algorithm.needs_reference:
            self.reference = self._make_reference()
            self.ref_model = self.reference.model if isinstance(self.reference, FrozenModel) else None
            for callback in sync_callbacks(self.reference, self.args):
                self.add_callback(callback)
        elif self._given_reference is not None:
            raise ConfigError(
                f"A reference was given, but {type(self.algorithm).__name__} compares with none (beta=0?): leave it out."
            )
        if isinstance(self.algorithm, HasEntropyBonus) and self.algorithm.entropy_bonus is not None:
            self.entropy_bonus = BonusOfSteps(self.algorithm.entropy_bonus)

    def _also_reading(self) -> list[PreTrainedModel]:
        return [*super()._also_reading(), *reference_models(self.reference)]

    def _make_reference(self) -> Reference:
        new = self._has_new_adapter
        return reference_for(self.model, self._given_reference, self.args, self.accelerator, has_new_adapter=new)

    # ---- prompts ----

    def encode_settings(self, split: str) -> EncodeSettings:
        return EncodeSettings(
            kind="prompt_only",
            max_prompt_length=self.args.max_prompt_length,
            chat_template_kwargs=self.args.chat_template_kwargs,
            keep_columns=tuple(self._columns[split]),
            encoder_decoder=unwrap(self.model).config.is_encoder_decoder,
            num_proc=self.args.dataset_num_proc,
            needs_prompt=self._reads_prompts,
            context=self._context(),
        )

    def _context(self) -> int | None:
        """Tokens of a prompt with its completion, at most; None where the model does not say, or does not sample."""
        config = unwrap(self.model).config
        samples = self._reads_prompts and self.engine is None and not config.is_encoder_decoder
        return getattr(config.get_text_config(), "max_position_embeddings", None) if samples else None

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        columns = self._columns[split] = rows.column_names or list(next(iter(rows)))
        if "input_ids" not in columns or "prompt" in columns:
            encoded = super().encode(rows, split, name)
            warn_of_short_room(encoded, name, self._context(), self.args.max_completion_length)
            return encoded
        self._columns[split] = [*columns, "prompt"]
        rows = rows.map(lambda row: {"prompt": self.tokenizer.decode(row["input_ids"], skip_special_tokens=True)})
        limit = self.args.max_prompt_length or 0
        return super().encode(rows, split, name).map(lambda row: {"prompt_ids": row["input_ids"][-limit:]})

    def _shuffled(self, rows: Rows) -> Rows:
        """The rows: those of a dataset are shuffled later, when prompts are taken from it."""
        return rows if isinstance(rows, Dataset) else super()._shuffled(rows)

    def rows_as_text(self, n: int = 4) -> list[dict[str, Any]]:
        """No rows: the report shows prompts beside the completions that were sampled."""
        return []

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        shuffle = {"seed": args.seed, "shuffle": args.shuffle_dataset}
        self.prompts = Prompts(self.train_dataset, **shuffle, rank=args.process_index, world=args.world_size)
        self.sampler.samplings["train"] = 0
        self.buffer = RolloutBuffer(
            self.roll_out,
            minibatches=args.minibatches_per_rollout_batch,
            iterations=args.num_iterations,
            per_epoch=self.prompts.batches_per_epoch(args.prompts_per_rollout_batch),
        )
        return self.buffer.loader()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[list[Batch]], int]:
        self.restore_rng_state()  # before a rollout batch is sampled
        self._is_new_batch = self.buffer.is_new
        before = self._position()
        try:
            return super().get_batch_samples(*args, **kwargs)
        except EngineError as error:
            raise self._with_checkpoint(error, before) from error

    def _position(self) -> tuple[dict[str, Any], int, int]:
        return dict(vars(self.buffer)), self.prompts.cursor, self.sampler.samplings["train"]

    def _with_checkpoint(self, error: EngineError, before: tuple[dict[str, Any], int, int]) -> EngineError:
        """Write a checkpoint of the last step, as it was before the engine failed; the error, which says so."""
        step = self.state.global_step
        if step == 0:
            return error
        buffer, self.prompts.cursor, self.sampler.samplings["train"] = before
        vars(self.buffer).update(buffer)
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if not folder.exists():
            self._save_checkpoint(self.model, None)
        return EngineError(
            f"{error}\nTraining ends after step {step}, with a checkpoint in {folder}. To resume, once the engine is back: "
            'trainer.train(resume_from_checkpoint="last"), or the same command with --resume.'
        )

    # ---- a rollout batch ----

    def roll_out(self) -> list[Minibatch]:
        """The minibatches of a new rollout batch: sampled, rewarded, with advantages."""
        self.engine.sync(self.model_wrapped, self.state.global_step)
        groups = self.sample_rollout_batch()
        examples, experience = self.compute_advantages(groups, "train")
        self._log_rollouts(groups, experience, "train")
        if self.args.is_on_policy:
            examples = without_signals(examples, ["old_logprobs"])
        return self.minibatches(examples, groups, experience, self.args.minibatches_per_rollout_batch)

    def sample_rollout_batch(self) -> list[Group]:
        """As many groups as a rollout batch has; those without variance replaced by fresh prompts where that is asked for."""
        args, sampler = self.args, self.sampler
        groups = sampler.groups(self.prompts.take(args.prompts_per_rollout_batch), args.num_generations, "train")
        if args.zero_variance != "resample":
            return groups
        for _ in range(args.max_resampling):
            missing = torch.tensor([sum(map(sampler.is_flat, groups))], device=args.device)
            everywhere = self._gather(missing).tolist()
            if not any(everywhere):
                break
            groups += sampler.groups(self.prompts.deal(everywhere), args.num_generations, "train")
            groups.sort(key=sampler.is_flat)
            self._count("resampled_groups", missing.item(), len(groups))
            groups = groups[: args.prompts_per_rollout_batch]
        return groups

    def minibatches(
        self, examples: Sequence[Example], groups: Sequence[Group], experience: Experience, count: int
    ) -> list[Minibatch]:
        """The completions of a rollout batch that are learned from, in `count` minibatches."""
        return split_into_minibatches(examples, self.kept(groups, experience), count, self.micro_batch_budget())

    # ---- advantages ----

    def compute_advantages(self, groups: Sequence[Group], mode: str) -> tuple[list[Example], Experience]:
        """Examples with all signals that the loss needs, and the experience that they come from."""
        examples = [group.example for group in groups]
        local = experience_of(examples, self.sampler.combined(groups))
        signals = {"old_logprobs": local.signals["sampler_logprobs"]}
        if wanted := self._wanted(mode):
            signals |= self.score_rollouts(examples, lambda batch: self._score_policy_and_reference(batch, wanted))
        experience = self.with_advantages(local.with_signals(**signals), mode)
        added = {name: values for name, values in experience.signals.items() if name != "sampler_logprobs"}
        return with_signals(examples, added), experience

    def with_advantages(self, local: Experience, mode: str) -> Experience:
        """The experience of this process with what the algorithm adds to that of all processes.

        Its state (`after_round`) follows rollout batches that are trained on, and not those of an evaluation.
        """
        experience, everywhere = advantages_over_ranks(local, self.algorithm.advantages, self.accelerator)
        if mode == "train":
            self.algorithm, before = self.algorithm.after_round(everywhere), self.algorithm
            if not isinstance(self.algorithm, Algorithm):
                raise ConfigError(
                    f"after_round of {type(before).__name__} gave {self.algorithm!r}: it has to return the algorithm that "
                    "goes on, itself or another."
                )
        return experience

    @torch.no_grad()
    def score_rollouts(
        self, examples: Sequence[Example], numbers: Callable[[Batch], Mapping[str, Tensor]], *, count: int = 1
    ) -> dict[str, Tensor]:
        """Named `[N,C]` numbers of the examples' completions, by `numbers(batch)`, in at least `count` micro-batches."""
        groups = self.plan(examples, count)
        groups += groups[-1:] * (self._most(len(groups)) - len(groups))

        def parts() -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
            for group in groups:
                batch = self.collate([examples[i] for i in group]).to(self.args.device)
                with self.compute_loss_context_manager():
                    yield group, numbers(batch)

        return tables_of(examples, parts())

    def _wanted(self, mode: str) -> set[str]:
        """Signals of a rollout batch that have to be measured, besides the sampler's log-probabilities."""
        args, algorithm = self.args, self.algorithm
        given = self.engine.exact_logprobs(args.sampling_params(max_new_tokens=sys.maxsize, seed=0))
        doubted = args.recompute_old_logprobs or algorithm.needs_old_logprobs or not given
        needed = {
            "ref_logprobs": self.reference is not None,
            "old_logprobs": mode == "train" and doubted and not args.is_on_policy,
            "values": algorithm.needs_values,
            "entropy": algorithm.needs_entropy,
        }
        return {name for name, is_needed in needed.items() if is_needed}

    def _score_policy_and_reference(self, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
        """The signals `wanted`, from one pass of the policy where it is needed and one of the reference."""
        return score_signals(self.model_wrapped, self.reference, batch, wanted, temperature=self._temperature)

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

    def forward_pass(self, model: nn.Module, batch: Batch) -> Scores:
        return score(model, batch, want={"value"} if self.algorithm.needs_values else ())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        want = {"entropy", "value"} if self.algorithm.needs_values else {"entropy"}
        scores = score(model, batch, temperature=self._temperature, want=want)
        on_policy = "old_logprobs" not in batch.signals
        if on_policy:
            batch = replace(batch, signals={**batch.signals, "old_logprobs": scores.logprobs.detach()})
        loss, metrics = self.algorithm.loss(scores, batch)
        if "sampler_logprobs" in batch.signals and (on_policy or self._is_new_batch):
            sampler_logprobs = batch.signals["sampler_logprobs"]
            metrics = mismatch(scores.logprobs.detach(), sampler_logprobs, batch.mask, Correction()) | metrics
        loss = loss[:, None].expand_as(batch.mask) if loss.dim() == 1 else loss
        loss = loss * self._length_scale(batch)
        if "bonus_tokens" in batch.signals:
            loss = self.entropy_bonus(loss, scores, batch)
        return loss, of_scored(metrics, batch)

    def _length_scale(self, batch: Batch) -> Tensor | float:
        """Factor that turns a mean over the tokens of a completion into their sum, or their sum over a constant."""
        if self.args.loss_aggregation not in ("constant", "sum"):
            return 1.0
        lengths = batch.mask.sum(-1, keepdim=True)
        return lengths / self.sampler.completion_limit if self.args.loss_aggregation == "constant" else lengths

    # ---- entropy ----

    def statistics(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """How many tokens of the window an entropy bonus is the mean of."""
        if self.entropy_bonus is None:
            return {}
        return {"bonus_tokens": self._sum_over_processes(count_tokens(completions_of(examples))).float()}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.entropy_bonus is not None and self.entropy_bonus.sums is not None:
            if math.isfinite(policy_loss := self.entropy_bonus.end_step(self._sum_over_processes)):
                self._count("policy_loss", policy_loss)
            self._count("entropy_coef", self.entropy_bonus.bonus.coefficient)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- evaluation ----

    def prediction_step(
        self, model: nn.Module, inputs: list[Mapping[str, Any]], *_: Any, **__: Any
    ) -> tuple[None, None, None]:
        """Sample completions of a batch of prompts, and count their rewards and loss."""
        rows = inputs[: unduplicated_rows(self.args, self.accelerator, len(inputs))]
        n = self.num_generations_eval
        self.engine.sync(self.model_wrapped, self.state.global_step)
        groups = self.sampler.groups(rows, n, "eval") or [self._empty_group(inputs[0], n)]
        examples, experience = self.compute_advantages(groups, "eval")
        if rows:
            self._log_rollouts(groups, experience, "eval")
        else:
            self.rollout_logs["eval"].add(groups, experience, counted=False)
        examples = without_signals(examples, ["old_logprobs"])
        (kept,) = self.minibatches(examples, groups, experience, 1)
        self.evaluate_items(model, kept, {}, filling=examples[:1])
        return None, None, None

    def _empty_group(self, row: Mapping[str, Any], n: int) -> Group:
        return empty_group(row, *self.to_examples([row]), n, functions=len(self.rewards))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self.sampler.samplings["eval"] = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        log = self.rollout_logs["eval"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in log.take_logged().items()})
        log.write(self.state.global_step, metric_key_prefix)
        return output

    # ---- what is reported ----

    def _count(self, name: str, amount: float, per: float = 1.0, mode: str = "train") -> None:
        self.meters[mode].count(name, float(amount), per=float(per))

    def _log_rollouts(self, groups: Sequence[Group], experience: Experience, mode: str) -> None:
        self.rollout_logs[mode].add(groups, experience)

    def _train_metrics(self) -> dict[str, float]:
        logged = self.rollout_logs["train"].take_logged()
        return {**super()._train_metrics(), **logged, **self.engine.take_metrics()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            self.rollout_logs["train"].write(self.state.global_step)

    # ---- checkpoints ----

    def _algorithm_state(self) -> dict[str, Any]:
        return self.algorithm.state_dict()

    def _load_algorithm(self, state: Mapping[str, Any]) -> None:
        self.algorithm.load_state_dict(state)

    def _buffer_state(self) -> dict[str, Any]:
        """Where sampling and training stand, and the samples that are still to be learned from."""
        return {
            "buffer": self.buffer.state(),
            "cursor": self.prompts.cursor,
            "samplings": self.sampler.samplings["train"],
        }

    def _load_buffer(self, state: Mapping[str, Any]) -> None:
        self.prompts.cursor, self.sampler.samplings["train"] = state["cursor"], state["samplings"]
        if not self.args.ignore_data_skip:
            self.buffer.load_state(state["buffer"])


def of_scored(metrics: Metrics, batch: Batch) -> Metrics:
    """The metrics; those `[N]` of completions without a scored token are NaN, which is left out of averages."""
    nothing = batch.mask.amax(-1) == 0
    return {
        name: values.masked_fill(nothing, torch.nan) if values.shape == nothing.shape else values
        for name, values in metrics.items()
    }
