"""Supervised fine-tuning.

loss = − Σ w_t log π(t),   over the tokens that are trained on; see `trl.algorithms.sft`

SFTTrainer("facebook/opt-350m", train_dataset=dataset, dataset_text_field="text", max_seq_length=512).train()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from trl.algorithms import sft
from trl.data.encode import EncodeSettings
from trl.data.examples import columns_of
from trl.data.layout import lay_out
from trl.data.listed import ListedRows
from trl.data.packing import pack_examples
from trl.errors import ConfigError, DataError
from trl.models.adapters import prompt_adapter
from trl.models.layouts import why_not
from trl.models.load import load_processor, warn_of_own_loss
from trl.models.score import score, unwrap
from trl.trainers.arguments import EvalRows, Rows, TrainerKeywords
from trl.trainers.attributes import OfflineAttributes
from trl.trainers.base import BaseTrainer
from trl.trainers.config import TrainerConfig
from trl.trainers.eval_samples import EvalSamplesOptions, add_eval_samples
from trl.trainers.mapping_options import check_names
from trl.trainers.predictions import predictions
from trl.types import Batch, Metrics
from trl.vision.families import family_of, joins_of

DATASET_OPTIONS = ("skip_prepare_dataset", "add_special_tokens", "append_concat_token")


@dataclass
class SFTConfig(EvalSamplesOptions, TrainerConfig):
    """Options of `SFTTrainer`."""

    smooths_labels: ClassVar[bool] = True

    dataset_text_field: str = "text"
    """Column with the text, for rows that are plain text."""

    dataset_kwargs: dict[str, Any] | str | None = None
    """{"skip_prepare_dataset": true} passes rows to `data_collator` unchanged (not needed for rows with `input_ids`);
    {"add_special_tokens": false} adds no BOS to plain texts, {"append_concat_token": false} no EOS. Neither is ever added
    twice."""

    max_length: int | None = 1024
    """Most tokens per row; longer rows are cut by `truncation_mode`, and counted. None: no limit."""

    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """Which part of a long row is kept: its first tokens ("keep_start") or its last ("keep_end")."""

    completion_only_loss: bool | None = None
    """Train on the completion only. None: yes for prompt-completion rows."""

    assistant_only_loss: bool = False
    """Train on the assistant's turns only; works with every chat template whose turns can be told apart."""

    loss_type: Literal["nll", "chunked_nll", "dft"] = "nll"
    """"nll", or "dft" (arXiv:2508.05629), which weights each token by its probability. "chunked_nll" is another name of
    "nll", which is always computed in chunks."""

    packing: bool = False
    """Pack several short rows into one of up to `max_length` tokens; they do not attend to each other."""

    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    """"bfd" (best fit; long rows are cut), "bfd_split" (long rows are split), "wrapped" (rows are split anywhere)."""

    eval_packing: bool | None = None
    """Pack evaluation rows as well. None: as `packing`."""

    padding_free: bool = False
    """Raise an error if the model cannot be run without padding; layout="auto" avoids padding wherever the model can."""

    average_loss_over: Literal["token", "sequence"] = "token"
    """Average the loss of a step over all tokens ("token"), or within sequences and then over them ("sequence")."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainerConfig._VALID_DICT_FIELDS, "dataset_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("dataset_kwargs", self.dataset_kwargs, DATASET_OPTIONS)
        if self.packing and self.max_length is None:
            raise ConfigError("packing=True needs max_length, the number of tokens in a packed row.")


class SFTTrainer(OfflineAttributes, BaseTrainer):
    """Fine-tune a causal or encoder-decoder language model on texts, chats, or prompts with completions.

    formatting_func                 makes the text of a row from its columns: `(row) -> str`
    compute_metrics                 computes metrics from the logits of all evaluation tokens, which take an extra forward
                                    pass and much memory: `(EvalPrediction) -> {name: number}`, see `predictions`
    preprocess_logits_for_metrics   reduces the logits of a batch before they are stored: `(logits, labels) -> Tensor`

    The other arguments are those of `BaseTrainer`.
    """

    config_class = SFTConfig
    args: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        *,
        formatting_func: Callable[[dict], str | list[str]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        **keywords: Unpack[TrainerKeywords],
    ) -> None:
        self.formatting_func = formatting_func
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **keywords)
        add_eval_samples(self)
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics

    @property
    def averaging(self) -> str:
        return self.args.average_loss_over

    def encode_settings(self, split: str) -> EncodeSettings:
        args = self.args
        rows = args.dataset_kwargs or {}
        return EncodeSettings(
            kind=("dialogue", "language_modeling", "prompt_completion", "tokenized"),
            max_length=None if self._cut_by_packing(split) else args.max_length,
            truncation_mode=args.truncation_mode,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            text_field=args.dataset_text_field,
            add_special_tokens=rows.get("add_special_tokens", True),
            add_eos=rows.get("append_concat_token", True),
            encoder_decoder=unwrap(self.model).config.is_encoder_decoder,
            num_proc=args.dataset_num_proc,
        )

    @property
    def leaves_rows(self) -> bool:
        """Whether rows go to the `data_collator` as they are."""
        return bool((self.args.dataset_kwargs or {}).get("skip_prepare_dataset"))

    def image_processor(self) -> Any:
        """As in `BaseTrainer`; the model's own where a collator makes the images' inputs, and scripts give the tokenizer."""
        config = unwrap(self.model).config
        only_tokens = isinstance(self.processing_class, PreTrainedTokenizerBase) and family_of(config) is not None
        if only_tokens and self.leaves_rows and self.has_own_collator and config._name_or_path:
            return load_processor(unwrap(self.model), trust_remote_code=self.args.trust_remote_code)
        return self.processing_class

    def _encode_all(self, train: Rows | None, evaluation: EvalRows) -> tuple[Rows | None, EvalRows]:
        if self.leaves_rows and self.has_own_collator:
            listed = ListedRows()
            train, evaluation = listed.dataset(train), listed.dataset(evaluation)
            self.to_examples = listed.looking_up(self.to_examples)
        return super()._encode_all(train, evaluation)

    def in_known_columns(self, rows: Rows) -> Rows:
        as_they_are = self.formatting_func is not None or self.leaves_rows
        return rows if as_they_are else super().in_known_columns(rows)

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        if self.leaves_rows and (self.has_own_collator or "input_ids" not in columns_of(rows)):
            if not self.has_own_collator:
                raise ConfigError(
                    'dataset_kwargs={"skip_prepare_dataset": True} does not tokenize rows, and these have no input_ids: '
                    "give a data_collator that tokenizes them, or leave it out."
                )
            return rows
        if self.formatting_func is not None:
            rows = formatted(rows, self.formatting_func, self.args.dataset_text_field)
        encoded = super().encode(rows, split, name)
        if not self._packs(split):
            return encoded
        if self.images is not None:
            self._check_packs_images()
        packed, _ = pack_examples(encoded, self.args.max_length, self.args.packing_strategy)
        return packed

    def _check_packs_images(self) -> None:
        """Raises ConfigError if packing would split images, or merge a prompt that the model attends to bidirectionally."""
        if self.args.packing_strategy != "bfd":
            raise ConfigError(
                f"packing_strategy={self.args.packing_strategy!r} splits rows anywhere, also within images: set "
                'packing_strategy="bfd", which packs whole rows.'
            )
        if self.images.family.sees_ahead == "prompt":
            raise ConfigError(
                f"packing=True merges prompt and completion into one text, but {type(unwrap(self.model)).__name__} attends "
                'bidirectionally within prompts: set layout="packed" instead, which keeps prompts apart.'
            )

    def _cut_by_packing(self, split: str) -> bool:
        return self._packs(split) and self.args.packing_strategy != "bfd"

    def _lengths(self, split: str) -> dict[str, int | None]:
        lengths = super()._lengths(split)
        if not self._cut_by_packing(split):
            return lengths
        return {name: most for name, most in lengths.items() if most is not None and self.args.max_length > most}

    def _packs(self, split: str) -> bool:
        evaluation = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        return self.args.packing if split == "train" else evaluation

    @property
    def packs_rows(self) -> bool:
        """Whether the layout has to be one without padding."""
        return self.args.packing or self.args.padding_free

    def prepare_model(self) -> None:
        warn_of_own_loss(unwrap(self.model))
        super().prepare_model()
        if not self.packs_rows or self.layout != "padded":
            return
        asked = "packing" if self.args.packing else "padding_free"
        inner = unwrap(self.model)
        adapter = prompt_adapter(self._adapted())
        why = why_not(inner, "packed") if adapter is None else f"{adapter} can prefix only one sequence per row"
        raise ConfigError(
            f"{asked}=True does not work with {type(inner).__name__}: {why}. Documents would attend to each other. "
            f"Leave {asked} out: rows of similar length are batched together anyway."
        )

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool | None = None, *_: Any, **__: Any
    ) -> tuple[None, Tensor | None, Tensor | None]:
        super().prediction_step(model, inputs)
        if prediction_loss_only:
            return None, None, None
        _, rows = self.evaluated(inputs)
        config = unwrap(model).config
        batch = self.collate(rows) if config.is_encoder_decoder else lay_out(rows, "padded", joins=joins_of(config))
        with self.compute_loss_context_manager():
            return None, *predictions(model, batch.to(self.args.device))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        smoothing = self.args.label_smoothing_factor
        want = {"entropy", "greedy"} | ({"mean_logprob"} if smoothing else set())
        scores = score(model, batch, want=want)
        loss = sft.LOSSES[self.args.loss_type](scores)
        if smoothing:
            loss = sft.smoothed(loss, scores, epsilon=smoothing)
        return loss, sft.metrics(scores)


def formatted(rows: Rows, function: Callable[[dict], str | list[str]], text_field: str) -> Rows:
    """Map `function` over the rows, and store the texts that it returns in the column `text_field`.

    A function may take a row and return a str, or a list with one, or, as in older scripts, take a batch of columns and return
    a list. Calling it on the first row tells which: several texts or an exception mean that it takes batches.
    """
    first = next(iter(rows))
    try:
        made = function(dict(first))
    except Exception as error:  # a function for batches may fail in any way on a single row
        made = error
    if isinstance(made, Exception) or (isinstance(made, list) and not _makes_one_text(function, first, made)):
        return rows.map(lambda batch: {text_field: function(batch)}, batched=True, remove_columns=list(first))
    text = _text_of(made)
    if not isinstance(text, str):
        inside = "a list with " if isinstance(made, list) else ""
        raise DataError(f"formatting_func returned {inside}a {type(text).__name__} for row 1: it has to return a str.")
    return rows.map(lambda row: {text_field: _text_of(function(row))}, remove_columns=list(first))


def _makes_one_text(function: Callable[[dict], str | list[str]], row: Mapping[str, Any], made: list[str]) -> bool:
    """Whether a function that `made` a list of a row takes rows: it makes one text of two rows as well, or fails on them."""
    if len(made) != 1:
        return False
    try:
        return len(function({name: [value, value] for name, value in row.items()})) == 1
    except Exception:  # a function for rows may fail in any way on a batch
        return True


def _text_of(made: str | list[str]) -> str:
    """A text that may be the only one in a list."""
    return made[0] if isinstance(made, list) else made
