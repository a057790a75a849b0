"""Types of the keyword arguments that trainers pass on, for type checkers, editors and `inspect.signature`."""

from __future__ import annotations

import inspect
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
    """Options of the configuration that older scripts give to the trainer itself.

    A trainer accepts every option of its configuration as a keyword; listed are those that older trainers had as arguments.
    New code sets options in the configuration.
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
    """Keyword-only arguments of every trainer."""

    callbacks: list[Any] | None
    optimizers: tuple[Any, Any]
    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    quantization_config: Any
    peft_config: Any
    tokenizer: Any


class PreferenceKeywords(TrainerKeywords, total=False):
    """Keyword-only arguments of the preference trainers."""

    compute_metrics: Callable[[Any], dict[str, float]] | None


class OnlineKeywords(ClassicOptions, total=False):
    """Keyword-only arguments of the online trainers."""

    optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None
    tokenizer: Any


class OnlineDPOKeywords(OnlineKeywords, total=False):
    """Keyword-only arguments of `OnlineDPOTrainer`."""

    callbacks: list[Any] | None
    optimizers: tuple[Any, Any]
    quantization_config: Any
    peft_config: Any
    algorithm: Algorithm | None
    engine: RolloutEngine | None
    reference: str | nn.Module | None
    rollout_func: Callable[[list[Any], Any], Mapping[str, Any]] | None


class PPOKeywords(ClassicOptions, total=False):
    """Keyword arguments that `PPOTrainer` passes on to `OnlineTrainer`."""

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


OLDER = {*ClassicOptions.__annotations__, "tokenizer"}
"""Keywords that the signature of a trainer does not list: options, and the older name of an argument."""


def list_keywords(init: Callable[..., None]) -> None:
    """List in the signature of a trainer's constructor the arguments that its `**keywords` stand for.

    Scripts for several releases ask the signature which arguments there are, and drop the others.
    """
    signature = inspect.signature(init)
    *own, rest = signature.parameters.values()
    if rest.kind is not rest.VAR_KEYWORD or not str(rest.annotation).startswith("Unpack["):
        return
    types = globals()[rest.annotation.removeprefix("Unpack[").removesuffix("]")].__annotations__
    names = [name for name in types if name not in OLDER | signature.parameters.keys()]
    listed = [inspect.Parameter(name, rest.KEYWORD_ONLY, default=None, annotation=types[name]) for name in names]
    init.__signature__ = signature.replace(parameters=[*own, *listed, rest])
