"""Reward models: trained on pairs of completions, on scores, or on labels of reasoning steps.

    loss = −log σ(r(x, y_w) − r(x, y_l) − m);   for the others see `trl.algorithms.reward`

RewardTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset).train()
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftConfig, TaskType
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from trl.algorithms.reward import PairwiseReward, ScoreRegression, StepReward
from trl.data.columns import describe
from trl.data.encode import EncodeSettings, first_rows
from trl.errors import ConfigError, DataError, ModelError, RowError
from trl.models.adapters import HEADS
from trl.models.load import load_config
from trl.models.rewards import prepare_rewards, score_rewards
from trl.models.saved_adapters import hub_options
from trl.models.score import unwrap
from trl.trainers.arguments import Rows
from trl.trainers.config import TrainerConfig
from trl.trainers.reward_predictions import PredictsRewards
from trl.training.collectives import gather_on_main
from trl.types import Batch, Example, Metrics

logger = logging.getLogger(__name__)

PAIRED = ("tokenized_preference", "preference")
SCORED = ("prompt_completion", "language_modeling")


@dataclass
class RewardConfig(TrainerConfig):
    """Options of `RewardTrainer`."""

    learning_rate: float = 1e-4

    max_length: int | None = 1024
    """Most tokens of a prompt with one completion; longer ones are cut by `truncation_mode`, and counted."""

    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """How long rows are cut: "keep_start" cuts the end of completions, "keep_end" the beginning of the prompt."""

    disable_dropout: bool = True

    center_rewards_coefficient: float | None = None
    """Weight of (r_w + r_l)², which centres rewards at zero (arXiv:2312.09244, Eq. 2, recommends 0.01). None: off."""

    step_separator: str = "\n"
    """Text appended to each step of rows with labelled steps; a step's reward is read at its last token."""

    mistakes_shown: int = 5
    """Rows in the table of the most confident mistakes that evaluation prints; 0 for no table."""


class RewardTrainer(PredictsRewards):
    """Train a sequence classifier with one label as a reward model.

    Rows are pairs (`chosen`, `rejected`, an optional `margin`), completions with a number in `score`, or steps with a
    label each (`completions`, `labels`); texts, conversations, or token ids (`input_ids_chosen`, …).
    `compute_metrics` receives the rewards of an evaluation: see `trl.trainers.reward_predictions`. Other arguments: see
    `BaseTrainer`.
    """

    config_class = RewardConfig
    args: RewardConfig
    auto_class = AutoModelForSequenceClassification
    kind: str | None = None

    # ---- model ----

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        if isinstance(model, str):
            self._ask_for_one_label(model)
        model = super()._resolve_model(model, quantization_config, with_trained_head(peft_config))
        prepare_rewards(unwrap(model))
        return model

    def _ask_for_one_label(self, name: str) -> None:
        """Set num_labels=1 for loading the model. Raises ModelError for a classifier with several labels."""
        args = self.args
        kwargs = dict(args.model_init_kwargs or {})
        config = load_config(name, trust_remote_code=args.trust_remote_code, **hub_options(kwargs))
        labels = kwargs.get("num_labels", config.num_labels)
        is_classifier = any("ForSequenceClassification" in kind for kind in config.architectures or ())
        if labels != 1 and (is_classifier or "num_labels" in kwargs):
            raise ModelError(f"{name!r} is a classifier with {labels} labels: a reward model has one, num_labels=1.")
        args.model_init_kwargs = {**kwargs, "num_labels": 1}

    def prepare_model(self) -> None:
        inner = unwrap(self.model)
        self._add_router_loss(inner)
        self.layout = self._choose_layout(inner, multiple_completions=self.kind in PAIRED, measure=score_rewards)
        self._optimize_layers(inner)
        self._capture_layers(inner)
        self._warn_of_pad_token()

    def _warn_of_pad_token(self) -> None:
        """Warn if the classifiers of `transformers` would take the last token of rows, where rewards are read, for padding."""
        examples = [] if self.train_dataset is None else self.to_examples(list(first_rows(self.train_dataset, 1)))
        pad = self.tokenizer.pad_token_id
        if any(completion.ids[-1:] == [pad] for example in examples for completion in example.completions):
            logger.warning(
                f"Rows end with the pad token, {self.tokenizer.pad_token!r}. Rewards are read there in training and by RewardModel, "
                "but the classifiers of transformers read the last token that is not padding, which is the one before it. To use "
                "the model with them, give the tokenizer another pad_token before training."
            )

    # ---- data ----

    def encode_settings(self, split: str) -> EncodeSettings:
        args = self.args
        return EncodeSettings(
            kind=(*PAIRED, "stepwise", *SCORED),
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            step_separator=args.step_separator,
            needs_eos=False,
            keep_columns=("margin", "score"),
            num_proc=args.dataset_num_proc,
        )

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        for column in ("margin", "score"):
            check_numbers(rows, column, name)
        encoded = super().encode(rows, split, name)
        kind = self.encoded[name].kind
        if kind in SCORED and "score" not in (rows.column_names or next(iter(rows))):
            raise DataError(
                f"The dataset {name!r} has neither pairs (chosen, rejected) nor steps (completions, labels), and no "
                f"column 'score' beside its completions: it has {rows.column_names}. Add one of them."
            )
        if self.kind is not None and ALGORITHMS[kind] is not ALGORITHMS[self.kind]:
            raise DataError(
                f"The dataset {name!r} has rows of the kind {kind!r}, an earlier one of {self.kind!r}: use one kind for all."
            )
        self.kind = kind
        return encoded

    def collate(self, items: Sequence[Example]) -> Batch:
        return self.lay_out_rows(items)

    def forward_pass(self, model: nn.Module, batch: Batch) -> Tensor:
        return score_rewards(model, batch)

    # ---- loss ----

    @property
    def algorithm(self) -> PairwiseReward | ScoreRegression | StepReward:
        if self.kind in PAIRED:
            return PairwiseReward(self.args.center_rewards_coefficient)
        return ALGORITHMS[self.kind]()

    def weights(self, batch: Batch) -> Tensor:
        """Weight 1 for every pair `[P]`, every score `[N]`, or every step `[N,C]`."""
        if self.kind == "stepwise":
            return batch.mask
        return batch.mask.new_ones(len(batch.mask) // (2 if self.kind in PAIRED else 1))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        rewards = score_rewards(model, batch, per_token=self.kind == "stepwise")
        return self.algorithm.loss(rewards, batch)

    # ---- evaluation ----

    def predicted(self, metrics: Metrics, items: Sequence[Example]) -> tuple[Tensor, Tensor] | None:
        if self.kind == "stepwise" and self.compute_metrics is None:
            return None
        if self.kind == "stepwise":
            raise ConfigError(
                "compute_metrics receives rewards of whole completions, but these rows have labels of steps: leave it out."
            )
        rewards = metrics["mean_reward"]
        if self.kind in PAIRED:
            return rewards.view(-1, 2), rewards.new_zeros(len(items))
        return rewards, rewards.new_tensor([item.completions[0].signals["score"] for item in items])

    def evaluate_batch(self, model: nn.Module, items: Sequence[Example], statistics: Mapping[str, Tensor]) -> Metrics:
        metrics = super().evaluate_batch(model, items, statistics)
        if self.kind in PAIRED and self.args.mistakes_shown:
            self._judged.append((metrics["margin"], items))
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._judged: list[tuple[Tensor, Sequence[Example]]] = []
        output = super().evaluation_loop(*args, **kwargs)
        if self.kind in PAIRED and self.args.mistakes_shown:
            own = worst(self._judged, self.args.mistakes_shown)
            everywhere = [(torch.tensor(margins), examples) for margins, examples in gather_on_main(own)]
            print_mistakes(*worst(everywhere, self.args.mistakes_shown), self.tokenizer)
        return output


ALGORITHMS = {
    **dict.fromkeys(PAIRED, PairwiseReward),
    **dict.fromkeys(SCORED, ScoreRegression),
    "stepwise": StepReward,
}
"""Kind of rows → algorithm."""


def with_trained_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """A copy of the adapter's configuration for a classifier, whose new head is trained in full beside the adapter."""
    if peft_config is None:
        return None
    peft_config = copy.copy(peft_config)
    peft_config.task_type = TaskType.SEQ_CLS
    options = peft_config.to_dict()
    if "modules_to_save" in options:
        peft_config.modules_to_save = sorted({*(options["modules_to_save"] or ()), *HEADS})
    return peft_config


def check_numbers(rows: Rows, column: str, name: str) -> None:
    """Raise RowError, with row and value, if `column` holds anything but numbers."""
    first = next(iter(rows), {})
    if column not in first:
        return
    values = rows.with_format(None)[column] if isinstance(rows, Dataset) else [first[column]]
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RowError(row, f", column {column!r}: expected a number, found {describe(value)}.", name)


def worst(judged: Sequence[tuple[Tensor, Sequence[Example]]], count: int) -> tuple[list[float], list[Example]]:
    """The pairs with the most negative margins, at most `count`: their margins, smallest first, and the pairs."""
    margins = torch.cat([torch.zeros(0), *(margin.float().cpu() for margin, _ in judged)])
    examples = [example for _, examples in judged for example in examples]
    lowest, places = margins.topk(min(count, len(margins)), largest=False)
    wrong = [(m, i) for m, i in zip(lowest.tolist(), places.tolist(), strict=True) if m < 0]
    return [m for m, _ in wrong], [examples[i] for _, i in wrong]


def print_mistakes(
    margins: Sequence[float],
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    console: Console | None = None,
) -> None:
    """Print a table of pairs whose rejected completion got the higher reward."""
    if not examples:
        return
    table = Table("margin", "prompt", "chosen", "rejected", title="Most confident mistakes", show_lines=True)
    for margin, example in zip(margins, examples, strict=True):
        chosen, rejected = (snippet(tokenizer.decode(c.ids, skip_special_tokens=True)) for c in example.completions)
        prompt = snippet(tokenizer.decode(example.prompt, skip_special_tokens=True), keep_end=True)
        table.add_row(f"{margin:.2f}", prompt, chosen, rejected)
    (console or Console()).print(table)


def snippet(text: str, width: int = 120, *, keep_end: bool = False) -> str:
    """At most `width` characters of a text on one line, from its beginning or its end."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    return "…" + text[1 - width :] if keep_end else text[: width - 1] + "…"
