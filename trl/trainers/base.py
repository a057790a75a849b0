"""Base of the trainers of language models: loads the model, encodes rows, chooses the layout of micro-batches.

A trainer defines:

    config_class                 its options
    encode_settings(...)         which kinds of rows it takes, and which tokens are trained on
    weights(batch)               weight of each token (or sequence, or pair) before normalisation
    loss(model, batch)           loss, in the shape of the weights, and metrics

The data loader returns encoded rows; `trl.training.step_trainer` runs the optimizer steps on them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import is_in_notebook

from trl.callbacks.model_card import Trained, WritesModelCard
from trl.callbacks.report import ReportCallback
from trl.data.conventions import PAIR, in_known_columns
from trl.data.encode import Encoded, EncodeSettings, encode_dataset, first_rows, without_format
from trl.data.examples import (
    ENCODED,
    ImageCollator,
    check_collator,
    check_datasets,
    collate_examples,
    columns_of,
    examples_from,
    examples_of,
    row_numbers,
)
from trl.data.layout import lay_out_encoder_decoder
from trl.data.places import naming_rows, renumbering_rows
from trl.data.preview import as_text, preview_examples
from trl.errors import ConfigError
from trl.models.adapters import new_tokens, prompt_adapter, with_adapters, with_trained_tokens
from trl.models.graphs import release, without_graphs
from trl.models.image_features import MIB, ImageFeatures, encoder_parameters
from trl.models.layouts import choose_layout
from trl.models.load import (
    disable_dropout,
    keep_own_loss,
    keep_unpacked,
    load_model,
    make_trainable,
    mend_generation_config,
    naming_keywords,
    processor_source,
    tokenizer_of,
)
from trl.models.patching import evaluating
from trl.models.positions import learned_positions, pretrained_length
from trl.models.reference import FrozenModel, Reference
from trl.models.score import networks_of, prepare_scoring, unwrap
from trl.models.sharding import ready_for_fsdp2
from trl.models.value_heads.storage import without_copies
from trl.noise import without_noise, without_warnings
from trl.trainers.arguments import ClassicOptions, EvalRows, Rows, list_keywords
from trl.trainers.attributes import has_own_loss
from trl.trainers.config import TrainerConfig
from trl.trainers.heaviest import row_positions
from trl.trainers.layers import RunsLayers
from trl.trainers.option_checks import check_full_batch
from trl.trainers.option_effects import warn_of_image_options
from trl.trainers.options import resolve_args
from trl.trainers.out_of_memory import remedies
from trl.trainers.processor import processor_for, take_chat_template
from trl.trainers.reference import sync_callbacks
from trl.trainers.router import RouterTerm, router_loss
from trl.trainers.rows import RowsOfModel
from trl.training.length_samplers import STRATEGIES, sampler_by_length
from trl.training.nonfinite import SHOWN
from trl.training.optimizers import check_optimizer, warn_of_rounded_steps
from trl.types import Batch, Example
from trl.vision.images import PixelLimits
from trl.vision.processing import ImageProcessing

logger = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 2048
WIDTH = 60
"""Most characters of a row in an error message."""


class BaseTrainer(WritesModelCard, RunsLayers):
    """Base of the trainers: loads model and tokenizer, encodes rows, lays them out. Every trainer has these arguments.

    model               a name or folder, a model, or a model with adapters
    args                the trainer's configuration; plain `TrainingArguments` are accepted
    train_dataset       rows of any kind that the trainer takes, or rows that are already encoded
    processing_class    tokenizer or processor; loaded by the model's name if left out. Older name: `tokenizer`
    peft_config         the adapter to train, as `LoraConfig()`; all weights are trained if left out
    classic             options of the configuration given as keywords: `max_seq_length=512`
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    auto_class: ClassVar[Any] = None
    prompts_only: ClassVar[bool] = False
    """Whether rows are prompts, with other columns for the reward functions."""
    multiple_completions: ClassVar[bool] = False
    """Whether a prompt has several completions."""
    packs_rows: bool = False
    """Whether the layout has to be one without padding."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls) and cls.__module__.startswith("trl."):
            list_keywords(vars(cls)["__init__"])

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
        **classic: Unpack[ClassicOptions],
    ) -> None:
        self.args = resolve_args(self.config_class, args, classic, trainer=type(self).__name__, model=model)
        set_seed(self.args.seed)  # the same initial heads, adapters and new tokens in every run and on every process
        source = processor_source(model, self.args.model_init_kwargs or {})
        self.model = self._resolve_model(model, quantization_config, peft_config)
        inner = unwrap(self.model)
        self.processing_class = processor_for(self.args, inner, processing_class, tokenizer, source)
        self.tokenizer = tokenizer_of(self.processing_class)
        added = take_chat_template(self.args, inner, self.tokenizer)
        if isinstance(self._adapted(), PeftModel):
            self._train_new_tokens(added, has_new_adapter=peft_config is not None)
        data_collator = check_collator(data_collator, encoder_decoder=inner.config.is_encoder_decoder)
        self.has_own_collator = data_collator is not None
        self._prepare_images()
        collate = collate_examples if self.images is None else ImageCollator(self.images)
        self.to_examples = collate if data_collator is None else examples_from(data_collator, self.images)
        self.encoded: dict[str, Encoded] = {}
        if train_dataset is not None:
            self._check_folder_early()
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
        self._gave_optimizer = optimizers[0] is not None
        is_table = isinstance(train_dataset, Dataset) and self.images is None and not self.prompts_only
        self.lays_out_ahead = is_table and not self.has_own_collator and self.args.device.type != "cpu"
        self._add_reports()
        inner.add_model_tags(["trl", type(self).__name__.removesuffix("Trainer").lower()])
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self.prepare_model()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `StepTrainer` does. Raises ConfigError without training rows, or for an optimizer of another model."""
        if self.train_dataset is None:
            raise ConfigError(f"train_dataset is missing: {type(self).__name__}.train() learns from its rows.")
        if isinstance(self.train_dataset, Dataset) and not self.prompts_only:
            check_full_batch(self.args, len(self.train_dataset))
        if self._gave_optimizer:
            check_optimizer(self.optimizer, self.model)
        warn_of_rounded_steps(self.model, self.args.learning_rate)
        self._plan_activations()
        try:
            with without_noise("transformers.trainer_utils"):
                return super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            is_adapter, keeps = isinstance(self._adapted(), PeftModel), self.keeps_activations()
            note = remedies(self.args, positions=self.largest_pass, is_adapter=is_adapter, keeps_activations=keeps)
            error.add_note(note)
            raise
        finally:
            for model in (unwrap(self.model), *self._also_reading()):
                release(model, for_good=False)
            self._undo_activation_plan()

    # ---- what a trainer adds ----

    def encode_settings(self, split: str) -> EncodeSettings:
        """Which kinds of rows the trainer takes, and which tokens it trains on. `split` is "train" or "eval"."""
        raise NotImplementedError

    def prepare_model(self) -> None:
        """Prepare the loaded model before it is wrapped for distributed training."""
        inner = unwrap(self.model)
        prepare_scoring(inner)
        self._add_router_loss(inner)
        if self.accelerator.is_fsdp2:
            ready_for_fsdp2(self.model)
        if not inner.config.is_encoder_decoder:
            self.layout = self._choose_layout(inner)
        self._optimize_layers(inner)
        self._capture_layers(inner)

    def _add_router_loss(self, inner: PreTrainedModel) -> None:
        """Add the load-balancing loss of a mixture of experts, if the options or the model's configuration enable it."""
        router = router_loss(inner, self.args.router_aux_loss_coef, is_sharded=self.is_sharded)
        if router is None:
            return

        @torch.no_grad()
        def run(batch: Batch) -> None:
            with self.compute_loss_context_manager(), evaluating(self.model):
                self.forward_pass(self.model_wrapped, batch)

        meter, processes = self.meters["train"], self.accelerator.num_processes
        self.term = RouterTerm(router, run, self._sum_over_processes, meter, self.args.device, processes)

    def _choose_layout(self, inner: PreTrainedModel, **options: Any) -> str:
        if (adapter := prompt_adapter(self._adapted())) is not None:
            if self.args.layout not in ("auto", "padded"):
                raise ConfigError(
                    f"layout={self.args.layout!r} does not work with {adapter}, which can prefix only one sequence per row: "
                    'set layout="padded".'
                )
            return "padded"
        if self.args.neftune_noise_alpha and self.args.layout == "auto" and not self.packs_rows:
            return "padded"  # the noise is α/√(Td), of one sequence: arXiv:2310.05914, Algorithm 1
        trial = None if self.images is None else self.images.trial()
        half = self.args.bf16 or self.args.fp16
        options = {"multiple_completions": self.multiple_completions, "half": half, **options}
        return choose_layout(inner, self.args.layout, examples=trial, **options)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Keep accelerate from compiling the whole model: `torch_compile` compiles single layers (see `prepare_model`)."""
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    # ---- model, tokenizer, options ----

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        kwargs = self.args.model_init_kwargs or {}
        model = str(model) if isinstance(model, Path) else model
        if not isinstance(model, str | nn.Module):
            raise ConfigError(f"model is a {type(model).__name__}: give a model, its folder, or its hub name.")
        if isinstance(model, str):
            quantised = {} if quantization_config is None else {"quantization_config": quantization_config}
            loading = self.args.loading(kwargs)
            with naming_keywords("model_init_kwargs", loading, model):
                model = self._load(model, quantised | loading)
        elif kwargs or quantization_config is not None:
            name = "model_init_kwargs" if kwargs else "quantization_config"
            raise ConfigError(f"{name} was given, but the model is an object that is already loaded: leave one out.")
        keep_unpacked(model)
        keep_own_loss(model)
        model = self._with_adapters(model, peft_config)
        make_trainable(model)
        mend_generation_config(unwrap(model))
        if self.args.disable_dropout:
            disable_dropout(model)
        return model

    def _load(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        """The model `name`, loaded with these `options` of `from_pretrained`."""
        return load_model(name, auto_class=self.auto_class, **options)

    def _with_adapters(self, model: nn.Module, peft_config: Any) -> nn.Module:
        """Add the adapter that `peft_config` describes; subclasses also add their heads."""
        return with_adapters(model, peft_config, part=self.args.adapted_part)

    def _train_new_tokens(self, added: list[int], *, has_new_adapter: bool) -> None:
        """Make an adapter train the embeddings of tokens that the chat template or a resize has added."""
        if has_new_adapter:
            ids = new_tokens(unwrap(self.model), self.tokenizer, added)
            self._set_adapted(with_trained_tokens(self._adapted(), ids))
        elif added:
            raise ConfigError(
                f"chat_template_path={self.args.chat_template_path!r} adds {len(added)} tokens, whose embeddings the given "
                "adapter does not train: merge it into its model first (`trl merge`)."
            )

    def _adapted(self) -> nn.Module:
        """The language model with its adapters, if any, without the heads that a trainer puts around it."""
        return self.model

    def _set_adapted(self, model: nn.Module) -> None:
        self.model = model

    def _prepare_images(self) -> None:
        """Set `images`, which reads the images of rows (None for a tokenizer), and the cache of image features."""
        args, inner = self.args, unwrap(self.model)
        limits = PixelLimits(args.max_pixels, args.min_pixels, args.image_folder)
        self.images = ImageProcessing.of(self.image_processor(), inner.config, limits)
        if self.images is None:
            warn_of_image_options(args)
        room = args.image_features_mb * MIB if self.images is not None else 0
        self.image_features = ImageFeatures(inner, room, self._also_reading) if room else None
        if self.images is not None and any(p.requires_grad for p in encoder_parameters(inner).values()):
            args.ddp_find_unused_parameters = True  # many models do not use the last layers of their image encoder

    def image_processor(self) -> Any:
        """The processor by which images are read; no images are read with a tokenizer."""
        return self.processing_class

    def _add_reports(self) -> None:
        """Show a table in notebooks, and write the run's report as a page."""
        if is_in_notebook():
            from trl.callbacks.notebook import show_table

            show_table(self)
        if self.args.html_report:
            reports = tuple(str(encoded.report) for encoded in self.encoded.values())
            self.add_callback(ReportCallback(reports, rows=self.rows_as_text))

    # ---- data ----

    def _encode_all(self, train: Rows | None, evaluation: EvalRows) -> tuple[Rows | None, EvalRows]:
        check_datasets(train, evaluation)
        if train is not None:
            count = len(train) if isinstance(train, Dataset) else None
            with renumbering_rows(count, self._shuffled, "row"):
                train = self._encode_given(self._shuffled(train), "train", "train")
        if isinstance(evaluation, Mapping):
            return train, {name: self._encode_given(rows, "eval", name) for name, rows in evaluation.items()}
        return train, None if evaluation is None else self._encode_given(evaluation, "eval", "eval")

    def _encode_given(self, rows: Rows, split: str, name: str) -> Rows:
        """Encode rows as the user gave them; errors about a row name its dataset."""
        with naming_rows(name):
            return self.encode(self.in_known_columns(rows), split, name)

    def in_known_columns(self, rows: Rows) -> Rows:
        """Rename and convert the columns that other tools use to those that trl reads."""
        with self.args.main_process_first(desc="reading columns"):
            return in_known_columns(
                without_format(rows, "train"),
                has_template=self.tokenizer.chat_template is not None,
                prompts_only=self.prompts_only,
                text_field=getattr(self.args, "dataset_text_field", None),
            )

    def _shuffled(self, rows: Rows) -> Rows:
        return rows.shuffle(seed=self.args.seed) if self.args.shuffle_dataset else rows

    def encode(self, rows: Rows, split: str, name: str) -> Rows:
        """Encode rows for the collator. One process encodes, the others read its cache."""
        with self.args.main_process_first(desc=f"encoding {name}"):
            rows_known = self._rows_of_embedding()
            limits = {"vocabulary": rows_known, "embedded": rows_known, **self._lengths(split)}
            settings = dataclasses.replace(self.encode_settings(split), **limits)
            self.encoded[name] = encode_dataset(rows, self.tokenizer, settings=settings, name=name, images=self.images)
        return self.encoded[name].dataset

    def _lengths(self, split: str) -> dict[str, int | None]:
        """Limits on the tokens of a row: the size of a learned position embedding, and the pretrained length otherwise."""
        model = unwrap(self.model)
        return {"positions": learned_positions(model), "pretrained_length": pretrained_length(model)}

    def _rows_of_embedding(self) -> int | None:
        """Size of the model's vocabulary; None if its configuration has none."""
        return getattr(unwrap(self.model).config.get_text_config(), "vocab_size", None)

    def preview(self, n: int = 3) -> None:
        """Print the first `n` training rows as the model sees them, with the tokens that are trained on marked."""
        rows = list(first_rows(self.train_dataset, n))
        packed = [len(row["seq_lengths"]) for row in rows if "seq_lengths" in row]
        image_token = None if self.images is None else self.images.token_id
        examples = self.to_examples(rows)[:n]
        sides = PAIR if any(len(example.completions) == len(PAIR) for example in examples) else ()
        preview_examples(examples, self.tokenizer, image_token=image_token, packed=packed, sides=sides)
        for encoded in self.encoded.values():
            print(encoded.report)

    def rows_as_text(self, n: int = 4) -> list[dict[str, Any]]:
        """The first `n` training rows, `{"prompt", "completions"}`, for the report."""
        if self.train_dataset is None:
            return []
        examples = self.to_examples(list(first_rows(self.train_dataset, n)))[:n]
        return [as_text(example, self.tokenizer) for example in examples]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in STRATEGIES or not isinstance(rows, Dataset):
            return super()._get_train_sampler(rows)
        lengths = row_positions(rows, self.layout).tolist()
        return sampler_by_length(lengths, self.args, lambda: int(self.state.epoch or 0))

    # ---- hooks of StepTrainer ----

    def items(self, rows: Any, *, source: str) -> list[Example]:
        return examples_of(rows, source=source)

    def size(self, item: Example) -> int:
        return item.tokens

    def micro_batch_budget(self) -> int | None:
        """Most tokens of a micro-batch. On a CPU larger ones are not faster, and smaller ones need less padding."""
        if self.args.max_tokens_per_micro_batch is not None or self.args.device.type != "cpu":
            return self.args.max_tokens_per_micro_batch
        return CPU_TOKEN_BUDGET

    def describe(self, items: Sequence[Example]) -> list[str]:
        """The row number, if known, and the beginning of the text of each example."""
        collate = collate_examples if self.images is None else self.to_examples
        numbers = row_numbers(self.train_dataset, items[:SHOWN], collate)
        texts = (self.tokenizer.decode([*example.prompt, *example.completions[0].ids]) for example in items)
        return [
            f"{'' if number is None else f'train_dataset[{number}] '}{_shortened(text)!r}"
            for text, number in zip_longest(texts, numbers)
        ]

    def collate(self, items: Sequence[Example]) -> Batch:
        config = unwrap(self.model).config
        if config.is_encoder_decoder:
            pad, start = self.tokenizer.pad_token_id or 0, config.decoder_start_token_id
            return lay_out_encoder_decoder(items, pad_token_id=pad, decoder_start_token_id=start)
        return self.lay_out_rows(items)

    def _loss_alone(self, item: Example, batch: Batch) -> Tensor:
        with without_graphs(*networks_of(self.model)):
            return super()._loss_alone(item, batch)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ConfigError for a reference that is set after construction, and warns of rows set during training: neither is read.

        A loss of a script's own may read a reference that the script sets.
        """
        if name == "train_dataset" and vars(self).get("is_in_train"):
            logger.warning(
                "train_dataset was replaced during training, which goes on with the rows that it began with."
            )
        is_replaced = name == "ref_model" and "reference" in vars(self) and value not in (None, self.ref_model)
        if is_replaced and not has_own_loss(self):
            raise ConfigError(
                f"{type(self).__name__}.ref_model cannot be set: the reference is prepared when the trainer is constructed. Give it "
                "to a new trainer."
            )
        super().__setattr__(name, value)

    def _compare_with(self, reference: Reference) -> None:
        """Set `reference` as the trainer's reference; with sync_ref_model it is updated and saved in checkpoints."""
        self.ref_model = reference.model if isinstance(reference, FrozenModel) else None
        self.reference = reference
        for callback in sync_callbacks(reference, self.args):
            self.add_callback(callback)
        self.keep_reference(reference, moves=self.args.sync_ref_model)

    def lay_out_rows(self, examples: Sequence[Example]) -> Batch:
        """Collate prompts with their completions into a batch for a decoder or classifier."""
        return self._rows_of_model(examples, self.layout, counts_copies=self.term is not None)

    @cached_property
    def _rows_of_model(self) -> RowsOfModel:
        args = self.args
        return RowsOfModel(unwrap(self.model), self.images, self.image_features, args.device.type, args.width_multiple)

    # ---- evaluation ----

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on the trainer's evaluation rows, or on others, encoded or not; return the metrics."""
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._encoded_rows(eval_dataset, "eval")
        elif isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._encoded_rows(rows, name) for name, rows in eval_dataset.items()}
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_test_dataloader(self, test_dataset: Rows) -> DataLoader:
        return super().get_test_dataloader(self._encoded_rows(test_dataset, "test"))

    def _encoded_rows(self, rows: Rows, name: str) -> Rows:
        return rows if ENCODED & set(columns_of(rows)) else self._encode_given(rows, "eval", name)

    # ---- what is reported ----

    def floating_point_ops(self, inputs: list[Batch]) -> int:
        return 6 * self._parameters * sum(batch.positions for batch in inputs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model. `state_dict` is given if its weights were gathered from shards."""
        with without_warnings():
            super()._save(output_dir, None if state_dict is None else without_copies(unwrap(self.model), state_dict))

    def describe_model(self) -> tuple[Trained, list[Any]]:
        inner, config = unwrap(self.model), self.model.config.to_dict()
        kind = "encoder-decoder" if config.get("is_encoder_decoder") else "causal"
        if type(inner).__name__.endswith("ForSequenceClassification"):
            kind = "reward"
        model = Trained(
            config.get("_name_or_path") or None,
            kind,
            is_adapter=isinstance(self._adapted(), PeftModel),
            is_chat=self.tokenizer.chat_template is not None,
        )
        return model, [encoded.report for encoded in self.encoded.values()]


def _shortened(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
