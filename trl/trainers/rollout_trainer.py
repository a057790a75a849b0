"""Base of the trainers whose rows are prompts and which train on sampled completions: everything but the algorithm.

    rows ──encode──▶ prompts ──roll_out──▶ minibatches of a rollout batch ──▶ optimizer steps

A subclass defines in `roll_out` how a rollout batch is made: see `trl.trainers.online`. This module builds engine, sampler
and reward functions, encodes and orders the prompts, logs rollouts, and saves the position in the prompts in every
checkpoint, also in the one that it writes when the engine fails.

A rollout batch is sampled lazily, when training reaches its first micro-batch, so that it comes from the current weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from trl.compat.hooks import SAMPLER
from trl.data.encode import EncodeSettings
from trl.errors import ConfigError, EngineError
from trl.models.score import unwrap
from trl.rewards.reward import Reward, check_weights
from trl.rollouts.buffer import Minibatch, RolloutBuffer
from trl.rollouts.engine import RolloutEngine
from trl.rollouts.experience import Group
from trl.rollouts.local import LocalEngine
from trl.rollouts.prompts import Prompts
from trl.rollouts.vllm import VLLMEngine
from trl.trainers.arguments import Rows
from trl.trainers.base import BaseTrainer
from trl.trainers.online_config import OnlineConfig
from trl.trainers.prompt_room import warn_of_short_room
from trl.trainers.rollout_log import RolloutLog
from trl.trainers.sampling import GroupSampler, engine_for, rewards_for
from trl.trainers.sampling_memory import sampling_bytes
from trl.training.state import StateFunctions
from trl.types import Batch, Experience

RolloutFunction = Callable[[list[Any], Any], Mapping[str, Any]]
"""`rollout_func(prompts, trainer)`: see `trl.rollouts.function`."""


class RolloutTrainer(BaseTrainer):
    """Base of the trainers that sample completions of prompts. Its own arguments are keyword-only. Attributes:

    engine         generates completions
    sampler        calls the engine, then the reward functions
    prompts        the training rows in the order in which they are sampled from
    buffer         the minibatches of the current rollout batch
    rollout_logs   metrics and samples to log, by mode: "train" and "eval"
    """

    config_class = OnlineConfig
    args: OnlineConfig
    prompts_only = True
    multiple_completions = True
    sampler_class: ClassVar[type[GroupSampler]] = GroupSampler
    uncalled = SAMPLER

    def __init__(
        self,
        *arguments: Any,
        reward_funcs: Any,
        reward_processing_classes: Any,
        engine: RolloutEngine | None,
        rollout_func: RolloutFunction | None,
        **keywords: Any,
    ) -> None:
        if keywords.pop("data_collator", None) is not None:
            raise ConfigError(f"{type(self).__name__} samples from prompts one by one: leave `data_collator` out.")
        self.engine = engine
        self.buffer: RolloutBuffer | None = None
        self._columns: dict[str, list[str]] = {}
        self._reward_funcs = reward_funcs
        self._reads_prompts = rollout_func is None
        super().__init__(*arguments, **keywords)
        self._prepare_sampling(reward_processing_classes, rollout_func)
        self.data_collator = list

    def roll_out(self) -> list[Minibatch]:
        """Sample a new rollout batch and return its minibatches."""
        raise NotImplementedError

    # ---- parts ----

    @property
    def rewards(self) -> Sequence[Reward]:
        """The reward functions."""
        return self.sampler.rewards

    @property
    def rollout_func(self) -> RolloutFunction | None:
        """The function that generates completions in place of the engine. It may be set."""
        return self._rollout_func

    @rollout_func.setter
    def rollout_func(self, function: RolloutFunction | None) -> None:
        self._rollout_func = function
        self.sampler.rollout_func = None if function is None else lambda prompts: function(prompts, self)

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        self.args.check_batches()
        check_weights(self._given_rewards(), self.args.reward_weights)
        if self.engine is None:
            self.args.check_installed()
        return super()._resolve_model(model, quantization_config, peft_config)

    def _given_rewards(self) -> Any:
        """The reward functions as given, by argument or by option."""
        return self._reward_funcs

    def prepare_model(self) -> None:
        super().prepare_model()
        shown = self.is_local_process_zero() and not self.args.disable_tqdm
        self.engine = engine_for(self.args, self.engine, self.model, self.processing_class, progress=shown)
        if isinstance(self.engine, LocalEngine):
            self.engine.image_features = self.image_features
        self.states.register("rollouts", StateFunctions(self._buffer_state, self._load_buffer), per_rank=True)

    def _prepare_sampling(self, reward_processing_classes: Any, rollout_func: RolloutFunction | None) -> None:
        """Create the reward functions, the sampler and the logs of rollouts."""
        columns = [] if rollout_func is not None else self._columns.values()  # a rollout_func may add columns: no check
        rewards = rewards_for(self.args, self._given_rewards(), columns, processing_classes=reward_processing_classes)
        self.sampler = self.sampler_class(
            self.args,
            unwrap(self.model),
            self.tokenizer,
            self.images,
            self.to_examples,
            lambda: self.engine,
            rewards,
            state=lambda: self.state,
        )
        self.rollout_func = rollout_func
        self.rollout_logs = {
            mode: RolloutLog(self.sampler, mode, meter, self.accelerator) for mode, meter in self.meters.items()
        }
        self.states.register("completions", self.rollout_logs["train"].completions, per_rank=True, optional=True)
        self.states.register("logged", self.sampler.logged["train"], per_rank=True, optional=True)

    def captures_by_default(self) -> bool:
        """Whether enough device memory is left for sampling beside the gradients and activations that CUDA graphs hold on to."""
        if self.activation_plan is None:
            return False
        sampling = 0
        if isinstance(self.engine, LocalEngine):
            sampling = sampling_bytes(self.args, unwrap(self.model), self.train_dataset)
        elif isinstance(self.engine, VLLMEngine) and self.engine.sleeps:
            sampling = self.engine.device_bytes
        return self.activation_plan.leaves(sampling)

    def _free_bytes(self) -> int:
        """The free bytes of the device, without those that vLLM in this process takes later, and keeps during training."""
        engine = self.engine
        later = isinstance(engine, VLLMEngine) and engine.llm is None and not engine.sleeps
        return super()._free_bytes() - (engine.device_bytes if later else 0)

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
        """The model's context length in tokens; None if its configuration has none, or an engine or function was given."""
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
        """The rows of a `Dataset` as they are, since `Prompts` shuffles them; those of a stream shuffled."""
        return rows if isinstance(rows, Dataset) else super()._shuffled(rows)

    def rows_as_text(self, n: int = 4) -> list[dict[str, Any]]:
        """No rows: the report shows sampled completions with their prompts instead."""
        return []

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        shuffle = {"seed": args.seed, "shuffle": args.shuffle_dataset}
        self.prompts = Prompts(self.train_dataset, **shuffle, rank=args.process_index, world=args.world_size)
        self.sampler.samplings["train"] = 0
        self.buffer = RolloutBuffer(
            self._next_rollout_batch,
            minibatches=args.minibatches_per_rollout_batch,
            iterations=args.num_iterations,
            per_epoch=self.prompts.batches_per_epoch(args.prompts_per_rollout_batch),
        )
        return self.buffer.loader()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[list[Batch]], int]:
        self.restore_rng_state()  # after resuming, before sampling draws random numbers
        self.buffer.begin_step()
        try:
            return super().get_batch_samples(*args, **kwargs)
        except EngineError as error:
            raise self._with_checkpoint(error) from error

    def _next_rollout_batch(self) -> list[Minibatch]:
        """Call `roll_out`; if the engine fails, go back to where it began, so that the next try has the same prompts
        and seeds."""
        before = self.prompts.cursor, self.sampler.samplings["train"]
        try:
            return self.roll_out()
        except EngineError:
            self.prompts.cursor, self.sampler.samplings["train"] = before
            raise

    def _with_checkpoint(self, error: EngineError) -> EngineError:
        """Write a checkpoint of the last step, and return the error with a note that says how to resume from it."""
        step = self.state.global_step
        if step == 0:
            return error
        self.buffer.take_back()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if not folder.exists():
            self._save_checkpoint(self.model, None)
        return EngineError(
            f"{error}\nTraining ends after step {step}, with a checkpoint in {folder}. To resume, once the engine is back: "
            'trainer.train(resume_from_checkpoint="last"), or the same command with --resume.'
        )

    # ---- checkpoints ----

    def _buffer_state(self) -> dict[str, Any]:
        """The state in a checkpoint: position in the prompts, number of samplings, and minibatches not yet trained on."""
        return {
            "buffer": self.buffer.state(),
            "cursor": self.prompts.cursor,
            "samplings": self.sampler.samplings["train"],
        }

    def _load_buffer(self, state: Mapping[str, Any]) -> None:
        self.prompts.cursor, self.sampler.samplings["train"] = state["cursor"], state["samplings"]
        if not self.args.ignore_data_skip:
            self.buffer.load_state(state["buffer"])

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

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.sampler.samplings["eval"] = 0
        return super().evaluation_loop(*args, **kwargs)

    def _eval_metrics(self, prefix: str) -> dict[str, float]:
        log = self.rollout_logs["eval"]
        metrics = super()._eval_metrics(prefix) | log.take_logged()
        log.write(self.state.global_step, prefix)
        return metrics

    def generate_completions(self) -> None:
        """Evaluate, and show the completions with their rewards, as with log_completions; for scripts of other releases."""
        shown, self.args.log_completions = self.args.log_completions, True
        try:
            self.evaluate()
        finally:
            self.args.log_completions = shown
