"""What every trainer shares: from a model, a tokenizer and rows to an optimizer step, on `transformers.Trainer`.

A trainer says what it is in few places:

    config_class                 its options
    encode_settings(...)         which rows it takes, and what is trained on
    weights(batch)               what a token (or sequence, or pair) weighs before normalisation
    loss(model, batch)           loss, in the shape of the weights, and metrics

The rest is here. The loader hands over encoded rows; `get_batch_samples` sees the rows of a whole accumulation window,
plans its micro-batches by length, lays them out, and gives every loss a weight such that the weights sum to 1 over the
window and all processes: see `trl.training.window`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from trl.callbacks.model_card import write_model_card
from trl.callbacks.report import ReportCallback
from trl.compat import ARGUMENTS, reject_unused_overrides, remedy
from trl.data.chat import clone_chat_template
from trl.data.encode import Encoded, EncodeSettings, encode_dataset
from trl.data.examples import ENCODED, check_datasets, collate_examples, columns_of, examples_from, examples_of
from trl.data.layout import lay_out, lay_out_encoder_decoder
from trl.data.preview import preview_examples
from trl.errors import ConfigError
from trl.models.layouts import choose_layout
from trl.models.load import (
    disable_dropout,
    load_model,
    load_processor,
    make_trainable,
    set_token,
    tokenizer_of,
    with_adapters,
)
from trl.models.score import prepare_scoring, unwrap
from trl.models.sharding import share_modules
from trl.models.value_heads.storage import without_copies
from trl.ops.reduce import WEIGHTS
from trl.trainers.config import TEMPLATES, TrainerConfig
from trl.training.metrics import Meter
from trl.training.nonfinite import SkippedSteps, Window, accept_step, propagate_nonfinite
from trl.training.parallel import accumulating, check_engine, explain_waits, unduplicated_rows, use_one_device
from trl.training.resumable import ResumableTrainer
from trl.training.window import dummy_batch, normalize_weights, plan_micro_batches, split_into_slots, with_signals
from trl.types import Batch, Example, Metrics

logger = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 2048

Rows = Dataset | IterableDataset
EvalRows = Rows | DatasetDict | IterableDatasetDict | Mapping[str, Rows] | None


class BaseTrainer(ResumableTrainer):
    """Base of the trainers. See the top of the file for what a trainer adds; its arguments are those of every trainer.

    model               a name or folder, a model, or a model with adapters
    args                the trainer's configuration; plain `TrainingArguments` are accepted
    train_dataset       rows of any kind that the trainer takes, or rows encoded before
    processing_class    tokenizer or processor; loaded by the model's name if left out. Older name: `tokenizer`
    peft_config         train a new adapter
    classic             options of the configuration given as keywords: `max_seq_length=512`
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    auto_class: ClassVar[Any] = None
    averaging: str = "token"
    multiple_completions: ClassVar[bool] = False
    """Whether a prompt has several completions."""
    loss_is_scaled_for_ga = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        reject_unused_overrides(cls)

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        *,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        tokenizer: Any = None,
        **classic: Any,
    ) -> None:
        self.args = self._resolve_args(args, classic)
        self.model = self._resolve_model(model, quantization_config, peft_config)
        self.processing_class = self._resolve_processor(processing_class, tokenizer)
        self.tokenizer = tokenizer_of(self.processing_class)
        self.to_examples = collate_examples if data_collator is None else examples_from(data_collator)
        self.encoded: dict[str, Encoded] = {}
        train_dataset, eval_dataset = self._encode_all(train_dataset, eval_dataset)
        super().__init__(
            model=self.model,
            args=self.args,
            data_collator=self.to_examples,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        check_engine(self.args, self.accelerator)
        use_one_device(self.args)
        if self.args.html_report:
            self.add_callback(ReportCallback(tuple(str(encoded.report) for encoded in self.encoded.values())))
        self.model_accepts_loss_kwargs = True
        self.meters = {"train": Meter(), "eval": Meter()}
        self.steps = SkippedSteps()
        self.states.register("metrics", self.meters["train"], per_rank=True, optional=True)
        self.states.register("steps", self.steps, optional=True)
        self._throughput = (0, 0.0)
        self._window_started: float | None = None
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self.prepare_model()

    # ---- what a trainer adds ----

    def encode_settings(self, split: str) -> EncodeSettings:
        """Which kinds of rows are taken, and what of them is trained on. `split` is "train" or "eval"."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of `batch`, in the shape of `weights(batch)`, and metrics."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> Tensor:
        """Unnormalised weights of the losses of a batch."""
        return WEIGHTS[self.averaging](batch.mask)

    def statistics(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Numbers of a whole window, over all processes, that its losses need as signals: `{name: scalar}`.

        Asked for once per window, before it is trained on, and once per evaluation batch.
        """
        return {}

    def prepare_model(self) -> None:
        """Last preparations of the model in memory, before anything wraps it."""
        inner = unwrap(self.model)
        prepare_scoring(inner)
        if self.accelerator.is_fsdp2:
            share_modules(self.model)
        if not inner.config.is_encoder_decoder:
            self.layout = choose_layout(inner, self.args.layout, multiple_completions=self.multiple_completions)

    # ---- model, tokenizer, options ----

    @classmethod
    def _resolve_args(cls, args: TrainingArguments | None, classic: dict[str, Any]) -> TrainerConfig:
        """The configuration, with options that were given as keywords of the trainer put into it."""
        if args is None:
            return cls.config_class(**cls._options(classic))
        if not isinstance(args, cls.config_class):
            fields = {f.name for f in dataclasses.fields(cls.config_class) if f.init}
            given = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name in fields}
            return cls.config_class(**{**given, **cls._options(classic)})
        args = copy.copy(args)
        for name, value in cls._options(classic).items():
            setattr(args, name, value)
        args.check_values()
        return args

    @classmethod
    def _options(cls, classic: dict[str, Any]) -> dict[str, Any]:
        """Options of the configuration, by their names today, that were given as keywords of the trainer."""
        options = {name: value for name, value in classic.items() if value is not None or name not in ARGUMENTS}
        known = [*(f.name for f in dataclasses.fields(cls.config_class)), *cls.config_class.ALIASES]
        for name in options:
            if name not in known:
                arguments = [*known, *Trainer.__init__.__annotations__, "tokenizer", "peft_config"]
                raise ConfigError(f"{cls.__name__} has no argument {name!r}.{remedy(name, arguments)}")
        return cls.config_class.translated(options)

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        kwargs = self.args.model_init_kwargs or {}
        if isinstance(model, str):
            quantised = {} if quantization_config is None else {"quantization_config": quantization_config}
            model = load_model(model, auto_class=self.auto_class, **quantised | self.args.loading(kwargs))
        elif kwargs or quantization_config is not None:
            name = "model_init_kwargs" if kwargs else "quantization_config"
            raise ConfigError(f"{name} was given, but the model is an object that is loaded already: leave one out.")
        model = with_adapters(model, peft_config)
        make_trainable(model)
        if self.args.disable_dropout:
            disable_dropout(model)
        return model

    def _resolve_processor(self, processing_class: Any, tokenizer: Any) -> Any:
        if processing_class is not None and tokenizer is not None:
            raise ConfigError("processing_class and tokenizer are two names of one argument: give one of them.")
        processor = processing_class if processing_class is not None else tokenizer
        if processor is None:
            processor = load_processor(unwrap(self.model), trust_remote_code=self.args.trust_remote_code)
        for token in ("pad_token", "eos_token"):
            if (value := getattr(self.args, token)) is not None:
                set_token(tokenizer_of(processor), token, value)
        if (path := self.args.chat_template_path) is not None:
            self._take_chat_template(tokenizer_of(processor), path)
        return processor

    def _take_chat_template(self, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
        if path.endswith(TEMPLATES):
            tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
        else:
            clone_chat_template(unwrap(self.model), tokenizer, path)

    # ---- data ----

    def _encode_all(self, train: Rows | None, evaluation: EvalRows) -> tuple[Rows | None, EvalRows]:
        check_datasets(train, evaluation)
        if train is not None:
            train = self.encode(self._shuffled(train), "train", "train")
        if isinstance(evaluation, Mapping):
            return train, {name: self.encode(rows, "eval", name) for name, rows in evaluation.items()}
        return train, None if evaluation is None else self.encode(evaluation, "eval", "eval")

    def _shuffled(self, rows: Rows) -> Rows:
        return rows.shuffle(seed=self.args.seed) if self.args.shuffle_dataset else rows

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        """Rows as the collator reads them. One process encodes, the others read its cache."""
        with self.args.main_process_first(desc=f"encoding {name}"):
            self.encoded[name] = encode_dataset(rows, self.tokenizer, settings=self.encode_settings(split), name=name)
        return self.encoded[name].dataset

    def preview(self, n: int = 3) -> None:
        """Print the first `n` training rows as the model sees them: what is trained on, and what is not."""
        preview_examples(self.to_examples(list(self.train_dataset.take(n)))[:n], self.tokenizer)
        if "train" in self.encoded:
            print(self.encoded["train"].report)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        return data_collator

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with explain_waits(self):
            return super()._inner_training_loop(*args, **kwargs)

    # ---- the window ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Example]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Batch]], int]:
        """The rows of one optimizer step, as micro-batches laid out and weighed: a list of them per counted step."""
        if self.is_finished():
            return [], 1
        self._window_started = time.perf_counter()
        pulled = [
            examples_of(batch, source="get_train_dataloader")
            for _, batch in zip(range(num_batches), epoch_iterator, strict=False)
        ]
        self.restore_rng_state()
        examples = [example for examples in pulled for example in examples]
        if not examples:
            return [], 1
        groups = self._plan(examples, len(pulled))
        batches = with_signals(
            [self.lay_out([examples[i] for i in group]) for group in groups], self.statistics(examples)
        )
        batches, tokens = normalize_weights(batches, self.weights, self._sum_over_processes)
        self._count_tokens(tokens)
        batches += [dummy_batch(batches[-1])] * (self._most(len(batches)) - len(batches))
        parts = [[examples[i] for i in group] for group in groups]
        self._window = Window(parts, batches, self._tr_loss.clone(), self.meters["train"].mark())
        return split_into_slots(batches, len(pulled)), 1

    def _plan(self, examples: Sequence[Example], count: int) -> list[list[int]]:
        """Which examples share a forward pass."""
        sizes = [example.tokens for example in examples]
        return plan_micro_batches(sizes, count=count, token_budget=self.token_budget())

    def token_budget(self) -> int | None:
        """Tokens that a forward pass should stay under. A CPU gains nothing from wider ones, and narrow ones pad less."""
        if self.args.max_tokens_per_micro_batch is not None or self.args.device.type != "cpu":
            return self.args.max_tokens_per_micro_batch
        return CPU_TOKEN_BUDGET

    def lay_out(self, examples: Sequence[Example]) -> Batch:
        config = unwrap(self.model).config
        if config.is_encoder_decoder:
            pad, start = self.tokenizer.pad_token_id or 0, config.decoder_start_token_id
            return lay_out_encoder_decoder(examples, pad_token_id=pad, decoder_start_token_id=start)
        return self.lay_out_rows(examples)

    def lay_out_rows(self, examples: Sequence[Example]) -> Batch:
        """Prompts and completions in one grid, as decoders and classifiers read them."""
        config = unwrap(self.model).config
        # Any token will do; models warn about their padding token where there is nothing to mask.
        pad = 1 if config.get_text_config().to_dict().get("pad_token_id") == 0 else 0
        # Flash attention skips pairs that are masked: one long row is best.
        capacity = 2**62 if "flash" in config._attn_implementation else None
        width = config.get_text_config().hidden_size
        return lay_out(
            examples,
            self.layout,
            pad_token_id=pad,
            capacity=capacity,
            hidden_size=width,
            multiple_of=self.args.width_multiple,
        )

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self._gather(values[None].to(self.args.device)).sum(0).cpu()

    def training_step(self, model: nn.Module, inputs: list[Batch], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the micro-batches that stand for one counted step."""
        *before, last = inputs
        loss = torch.zeros((), device=self.args.device)
        for batch in before:
            with accumulating(self.accelerator, model):
                loss += super().training_step(model, batch, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Metrics]:
        """Σ weight · loss, times the processes, over which gradients are averaged; as asked for, with the metrics."""
        loss, metrics = self.loss(model, inputs)
        if inputs.tokens:
            positions = _positions(inputs)
            self.meters["train"].add(metrics, inputs)
            self.meters["train"].count("padding_share", positions - inputs.tokens, per=positions)
        total = propagate_nonfinite((loss * inputs.weight).sum() * self.accelerator.num_processes)
        return (total, metrics) if return_outputs else total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm that is logged; None if the step is skipped, since it is not finite: see `trl.training.nonfinite`."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm if accept_step(self, model, norm, self._window) else None

    def rollback_metrics(self) -> None:
        """Go back to what was counted before this step."""
        self.meters["train"].go_back(self._window.mark)
        self._tr_loss.copy_(self._window.loss)

    # ---- evaluation ----

    def prediction_step(self, model: nn.Module, inputs: list[Example], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Count a batch into the evaluation's metrics; nothing is kept or gathered per batch."""
        inputs = examples_of(inputs, source="get_eval_dataloader")
        counted = inputs[: unduplicated_rows(self.args, self.accelerator, len(inputs))]
        self.evaluate_examples(model, counted, self.statistics(inputs), filling=inputs[:1])
        return None, None, None

    def evaluate_examples(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        statistics: Mapping[str, Tensor],
        *,
        filling: Sequence[Example],
    ) -> None:
        """Count `examples` into the evaluation's metrics, in as many forward passes as every other process.

        `filling` is run, and not counted, where another process has more.
        """
        groups = [[examples[i] for i in group] for group in self._plan(examples, 1)]
        missing = self._most(len(groups)) - len(groups)
        for group in groups:
            self.evaluate_batch(model, group, statistics)
        for _ in range(missing):
            (batch,) = with_signals([self.lay_out(filling)], statistics)
            with torch.no_grad(), self.compute_loss_context_manager():
                self.loss(model, dummy_batch(replace(batch, weight=batch.mask)).to(self.args.device))

    def evaluate_batch(
        self, model: nn.Module, examples: Sequence[Example], statistics: Mapping[str, Tensor]
    ) -> Metrics:
        """Count loss and metrics of `examples`, a part of an evaluation batch with these `statistics`."""
        (batch,) = with_signals([self.lay_out(examples)], statistics)
        batch = batch.to(self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics = self.loss(model, batch)
        self.meters["eval"].add_weighted("loss", loss, self.weights(batch))
        self.meters["eval"].add(metrics, batch)
        return metrics

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the trainer's evaluation rows, or of others, encoded or not."""
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._encoded_rows(eval_dataset, "eval")
        elif isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._encoded_rows(rows, name) for name, rows in eval_dataset.items()}
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_test_dataloader(self, test_dataset: Rows) -> DataLoader:
        return super().get_test_dataloader(self._encoded_rows(test_dataset, "test"))

    def _encoded_rows(self, rows: Rows, name: str) -> Rows:
        return rows if ENCODED & set(columns_of(rows)) else self.encode(rows, "eval", name)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in `transformers`, with metrics that are means over the whole set and not means of batch means."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self.meters["eval"].read(self._gather, self.args.device)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    # ---- what is reported ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**self.steps.corrected(logs), **self._train_metrics()}
        super().log(logs, start_time)

    def _train_metrics(self) -> dict[str, float]:
        """Metrics since the last log; tokens per second of training alone, over all processes."""
        metrics = self.meters["train"].read(self._gather, self.args.device)
        tokens, seconds = self._throughput
        self._throughput = (0, 0.0)
        return {**metrics, "num_tokens": self.state.num_input_tokens_seen, "tokens_per_second": tokens / seconds}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._stop_clock()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _count_tokens(self, tokens: int) -> None:
        self.state.num_input_tokens_seen += tokens
        self._throughput = (self._throughput[0] + tokens, self._throughput[1])

    def _stop_clock(self) -> None:
        if self._window_started is not None:
            spent = time.perf_counter() - self._window_started
            self._throughput = (self._throughput[0], self._throughput[1] + spent)
            self._window_started = None

    def _most(self, count: int) -> int:
        """The largest `count` of any process: all have to take part in as many forward passes."""
        return int(self._gather(torch.tensor([count], device=self.args.device)).max())

    def _gather(self, row: Tensor) -> Tensor:
        return self.accelerator.gather(row) if self.accelerator.num_processes > 1 else row

    def _track_num_input_tokens(self, inputs: list[Batch]) -> None:
        """Tokens are counted with the window."""

    def floating_point_ops(self, inputs: list[Batch]) -> int:
        return 6 * self._parameters * sum(map(_positions, inputs))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """`state_dict` is given where weights were gathered."""
        super()._save(output_dir, None if state_dict is None else without_copies(unwrap(self.model), state_dict))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: Sequence[str] | str | None = None,
        **_: Any,
    ) -> None:
        """Write README.md to the output folder: what was trained, how, and with which versions."""
        if self.is_world_process_zero():
            write_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)


def _positions(batch: Batch) -> int:
    """Positions of the grid, padding included; encoder and decoder together."""
    return sum(batch.inputs[name].numel() for name in ("input_ids", "decoder_input_ids") if name in batch.inputs)
