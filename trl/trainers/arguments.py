"""Keywords that constructors of trainers hand on, named so that type checkers and editors know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

if TYPE_CHECKING:
    from torch import nn

    from trl.rollouts.engine import RolloutEngine
    from trl.types import Algorithm

Rows = Dataset | IterableDataset
EvalRows = Rows | DatasetDict | IterableDatasetDict | Mapping[str, Rows] | None


class ClassicOptions(TypedDict, total=False):
    """Options of a configuration that scripts of older releases give to the trainer itself.

    A trainer takes every option of its configuration so; these are the ones that classic trainers had as arguments. New
    code gives options to the configuration, where all are known.
    """

    beta: float
    dataset_kwargs: dict[str, Any] | None
    dataset_num_proc: int | None
    dataset_text_field: str
    disable_dropout: bool
    eval_packing: bool | None
    force_use_ref_model: bool
    is_encoder_decoder: bool | None
    label_pad_token_id: int
    label_smoothing: float
    loss_type: str
    max_length: int | None
    max_prompt_length: int | None
    max_seq_length: int | None
    model_adapter_name: str | None
    model_init_kwargs: dict[str, Any] | None
    neftune_noise_alpha: float | None
    num_of_sequences: int
    chars_per_token: float
    dataset_batch_size: int | None
    packing: bool
    padding_value: int | None
    precompute_ref_log_probs: bool
    ref_adapter_name: str | None
    ref_model_init_kwargs: dict[str, Any] | None
    reference_free: bool
    truncation_mode: str


class TrainerKeywords(ClassicOptions, total=False):
    """What every trainer takes by keyword alone."""

    callbacks: list[Any] | None
    optimizers: tuple[Any, Any]
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    quantization_config: Any
    peft_config: Any
    tokenizer: Any


class PreferenceKeywords(TrainerKeywords, total=False):
    """What trainers of preferences take by keyword alone."""

    compute_metrics: Callable[[Any], dict[str, float]] | None


class OnlineKeywords(ClassicOptions, total=False):
    """What trainers that sample take by keyword beside the arguments that have a place."""

    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    tokenizer: Any


class OnlineDPOKeywords(OnlineKeywords, total=False):
    """What `OnlineDPOTrainer` takes by keyword alone."""

    callbacks: list[Any] | None
    optimizers: tuple[Any, Any]
    quantization_config: Any
    peft_config: Any
    algorithm: Algorithm | None
    engine: RolloutEngine | None
    reference: str | nn.Module | None
    rollout_func: Callable[[list[Any], Any], Mapping[str, Any]] | None


class PPOKeywords(ClassicOptions, total=False):
    """What `PPOTrainer` takes by keyword beside its own arguments."""

    rollout_func: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    reward_processing_classes: Any
    callbacks: list[Any] | None
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    quantization_config: Any
    peft_config: Any
    algorithm: Algorithm | None
    engine: RolloutEngine | None
