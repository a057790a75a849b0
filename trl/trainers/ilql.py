"""Offline reinforcement learning from samples and their rewards: implicit language Q-learning.

    loss = (Q − y)² + expectile(Q' − V) + CQL + exp(β (Q' − V)) · −log π;   see `trl.algorithms.ilql`

Training does not sample. Sampling is guided by the learned Q-values: softmax(topk(log π + β min Q') / τ); an evaluation
samples with every β of `eval_betas`.

ILQLTrainer("gpt2", train_dataset=Dataset.from_dict({"prompt": …, "completion": …, "reward": …})).train()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Unpack

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from trl.algorithms.ilql import ILQL, ILQLOptions
from trl.data.encode import EncodeSettings, encode_dataset
from trl.data.examples import columns_of
from trl.errors import ConfigError, DataError, RowError
from trl.models.score import score, unwrap
from trl.models.value_heads.ilql import WithILQLHeads, load_with_ilql_heads, with_ilql_heads
from trl.rewards.reward import make_rewards
from trl.rollouts.evaluation import SampledEvaluation
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.trainers.arguments import TrainerKeywords
from trl.trainers.base import EvalRows, Rows
from trl.trainers.config import TrainerConfig
from trl.trainers.value_head import ValueHeadTrainer
from trl.training.collectives import all_gather_object
from trl.types import Batch, Metrics, Scores

REWARD = "reward"


@dataclass
class ILQLConfig(ILQLOptions, TrainerConfig):
    """Options of `ILQLTrainer`."""

    ALIASES: ClassVar[dict[str, str]] = {**TrainerConfig.ALIASES, "max_new_tokens": "max_completion_length"}

    learning_rate: float = 5e-5

    max_length: int | None = 512
    """Most tokens per row; longer rows are cut by `truncation_mode`, and counted. None: no limit."""

    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """Which part of a long row is kept: its first tokens ("keep_start") or its last ("keep_end")."""

    dataset_text_field: str = "text"
    """Column with the text, for rows that are plain text."""

    normalize_rewards: bool = True
    """Normalise rewards to (r − mean)/std over the training rows; rewards per token are only divided by the std of their
    sums."""

    eval_betas: list[float] | None = None
    """Values of β to sample with in evaluation; the metrics of each end in "@beta=…". None: 1."""

    max_completion_length: int = 56
    """Most tokens per completion, in evaluation."""

    temperature: float = 1.0
    """Divides the sum of log-probabilities and β · min Q', in evaluation. 0: greedy."""

    top_k: int = 20
    """Sample among the k tokens with the highest sums, in evaluation; 0 for all."""

    num_generations_eval: int = 1
    """Completions of each prompt, for each β, in evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_algorithm()
        for beta in self.betas:
            self.sampling_params(beta=beta, seed=0)

    @property
    def betas(self) -> list[float]:
        """`eval_betas`, or its default."""
        return [1.0] if self.eval_betas is None else self.eval_betas

    def make_algorithm(self) -> ILQL:
        """The loss that these options describe. Raises ConfigError for those that are out of range."""
        return ILQL(**{name: getattr(self, name) for name in ILQLOptions.__dataclass_fields__})

    def sampling_params(self, *, beta: float, seed: int) -> SamplingParams:
        """The sampling parameters of an evaluation."""
        return SamplingParams(
            beta=beta,
            seed=seed,
            temperature=self.temperature,
            top_k=self.top_k,
            max_new_tokens=self.max_completion_length,
        )


class SyncTargets(TrainerCallback):
    """Updates the target Q heads every `steps_for_target_q_sync` optimizer steps."""

    def __init__(self, trainer: ILQLTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: ILQLConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % args.steps_for_target_q_sync == 0:
            self.trainer.accelerator.unwrap_model(self.trainer.model).sync_targets(args.alpha)


class ILQLTrainer(ValueHeadTrainer):
    """Learn from rows with a `reward`: one number, or a list with one for each token that is trained on.

    model           a model with ILQL heads, or a language model or its name, to which heads are added
    train_dataset   rows with `reward`, and `prompt` and `completion`; or `dialogue`, prompts and outputs in turn; or a text
                    or conversation; or `input_ids`
    reward_funcs    reward the completions that an evaluation samples, as in `OnlineTrainer`; without them it samples none
    eval_prompts    rows with `prompt` to sample from in evaluation; by default those of `eval_dataset`

    The other arguments are those of `BaseTrainer`.
    """

    config_class = ILQLConfig
    head_class = WithILQLHeads
    args: ILQLConfig

    def __init__(
        self,
        model: str | PreTrainedModel | WithILQLHeads | nn.Module,
        args: ILQLConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        *,
        reward_funcs: Any = None,
        eval_prompts: Dataset | None = None,
        **keywords: Unpack[TrainerKeywords],
    ) -> None:
        self.reward_scale: RewardScale | None = None
        self._rows: dict[str, Any] = {}
        super().__init__(model, args, None, train_dataset, eval_dataset, processing_class, **keywords)
        self.add_callback(SyncTargets(self))
        prompts = eval_dataset if eval_prompts is None else eval_prompts
        if reward_funcs is None and eval_prompts is not None:
            raise ConfigError("eval_prompts have no effect without reward_funcs: give both, or leave eval_prompts out.")
        self.sampled_evaluation = None if reward_funcs is None else self._sampled_evaluation(prompts, reward_funcs)

    @cached_property
    def algorithm(self) -> ILQL:
        return self.args.make_algorithm()

    # ---- model ----

    def _load(self, name: str, options: Mapping[str, Any]) -> WithILQLHeads:
        return load_with_ilql_heads(name, two_qs=self.args.two_qs, **options)

    def _with_head(self, model: nn.Module) -> WithILQLHeads:
        return with_ilql_heads(model, two_qs=self.args.two_qs)

    def _with_adapters(self, model: nn.Module, peft_config: Any) -> WithILQLHeads:
        model = super()._with_adapters(model, peft_config)
        if (qs := len(model.v_head.qs)) != self.algorithm.heads:
            raise ConfigError(f"two_qs={self.args.two_qs}, but the model has {qs} Q heads: set two_qs={qs == 2}.")
        return model

    # ---- rows ----

    def encode_settings(self, split: str) -> EncodeSettings:
        return EncodeSettings(
            kind=("dialogue", "prompt_completion", "language_modeling", "tokenized"),
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            text_field=self.args.dataset_text_field,
            encoder_decoder=self._is_encoder_decoder,
            num_proc=self.args.dataset_num_proc,
            **self._rows,
        )

    @property
    def _is_encoder_decoder(self) -> bool:
        return unwrap(self.model).config.is_encoder_decoder

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        columns = columns_of(rows)
        if REWARD not in columns:
            raise DataError(f"The dataset {name!r} has the columns {columns} and no 'reward', which ILQL learns from.")
        per_token = isinstance(next(iter(rows))[REWARD], list)
        if self.args.normalize_rewards and self.reward_scale is None:
            self.reward_scale = RewardScale.of(rows, name)
        self._rows = {
            "assistant_only_loss": bool({"messages", "conversations"} & set(columns)),
            "token_signals" if per_token else "keep_columns": (REWARD,),
        }
        return super().encode(rows, split, name)

    # ---- loss ----

    def forward_pass(self, model: nn.Module, batch: Batch) -> Scores:
        return score(model, batch, want={"value", "q"})

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        scores = score(model, batch, want={"value", "q", "entropy"})
        reward = batch.signals[REWARD]
        if self.reward_scale is not None:
            reward = self.reward_scale(reward)
        loss, metrics = self.algorithm.loss(scores, replace(batch, signals={**batch.signals, REWARD: reward}))
        return loss, {**metrics, "entropy": scores.entropy.detach()}

    # ---- evaluation ----

    def _sampled_evaluation(self, prompts: Any, reward_funcs: Any) -> SampledEvaluation:
        """The part of an evaluation that samples and rewards. Raises ConfigError without prompts to sample from."""
        if not isinstance(prompts, Dataset) or "prompt" not in prompts.column_names:
            raise ConfigError(
                "reward_funcs reward completions sampled in evaluation: give eval_prompts, rows with a column 'prompt'."
            )
        settings = EncodeSettings(
            kind="prompt_only", keep_columns=tuple(prompts.column_names), encoder_decoder=self._is_encoder_decoder
        )
        rows = encode_dataset(prompts, self.tokenizer, settings=settings, name="eval_prompts").dataset
        args = self.args
        params = {f"@beta={beta:g}": args.sampling_params(beta=beta, seed=args.seed) for beta in args.betas}
        return SampledEvaluation(rows.to_list(), params, make_rewards(reward_funcs), n=args.num_generations_eval)

    def _eval_metrics(self, prefix: str) -> dict[str, float]:
        metrics = super()._eval_metrics(prefix)
        if self.sampled_evaluation is None:
            return metrics
        found = self.sampled_evaluation(
            LocalEngine(self.model_wrapped, self.tokenizer, progress=False),
            self.tokenizer,
            rank=self.args.process_index,
            world=self.args.world_size,
            gather=lambda own: all_gather_object(own, self.accelerator),
        )
        return metrics | found.metrics


@dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of the rewards of all training rows; rewards per token are summed within a row first."""

    mean: float
    std: float

    @classmethod
    def of(cls, rows: Rows, name: str) -> RewardScale:
        """Raises ConfigError for a stream, DataError for a row whose reward is no finite number."""
        if not isinstance(rows, Dataset):
            raise ConfigError(
                "normalize_rewards=True needs all rewards before training, which a stream does not have: set it to False, and "
                "give rewards of mean 0 and standard deviation 1."
            )
        sums = [_total(reward, row, name) for row, reward in enumerate(rows[REWARD])]
        values = torch.tensor(sums, dtype=torch.float64)
        std = values.std().item() if len(values) > 1 else 0.0
        return cls(values.mean().item(), std or 1.0)

    def __call__(self, reward: Tensor) -> Tensor:
        """Normalise rewards `[N]` of completions; rewards of tokens `[N,C]` are only divided by the standard deviation."""
        return (reward - self.mean) / self.std if reward.dim() == 1 else reward / self.std


def _total(reward: Any, row: int, name: str) -> float:
    numbers = reward if isinstance(reward, list) else [reward]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise RowError(row, f", column 'reward': expected a finite number, or a list of them, found {reward!r}.", name)
    return float(sum(numbers))
