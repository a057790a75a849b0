"""Base of the preference trainers: chooses the reference model, and optionally precomputes its log-probabilities.

See `trl.models.reference` for the references themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Unpack

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from trl.data.encode import EncodeSettings
from trl.errors import ConfigError, unknown
from trl.models.reference import FrozenModel, NamedAdapter, Precomputed, Reference
from trl.models.score import unwrap
from trl.trainers.arguments import EvalRows, PreferenceKeywords, Rows
from trl.trainers.config import ReferenceConfig
from trl.trainers.eval_samples import EvalSamplesOptions, add_eval_samples
from trl.trainers.precompute import with_reference_logprobs
from trl.trainers.reference import reference_for
from trl.trainers.reward_predictions import PredictsRewards
from trl.types import Batch

logger = logging.getLogger(__name__)


@dataclass
class PreferenceConfig(EvalSamplesOptions, ReferenceConfig):
    """Options of the trainers that learn offline from preferences: pairs, or completions labelled good or bad."""

    ALIASES: ClassVar[dict[str, str]] = {
        **ReferenceConfig.ALIASES,
        "ref_model_kwargs": "ref_model_init_kwargs",
        "is_encoder_decoder": "",
        "label_pad_token_id": "",
        "padding_value": "",
        "base_model_attribute_name": "",
        "use_logits_to_keep": "",
        "use_num_logits_to_keep": "",
    }

    max_length: int | None = 1024
    """Most tokens of a prompt with one completion; longer ones are cut by `truncation_mode`, and counted."""

    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """How long rows are cut: "keep_start" cuts the end of completions, "keep_end" the beginning of the prompt."""

    disable_dropout: bool = True
    """Set every dropout probability of the model to zero, so that policy and reference differ only by training."""

    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probabilities once, before training, and cache them on disk; frees its memory."""

    precompute_ref_batch_size: int | None = None
    """Batch size of precompute_ref_log_probs. None: the per-device batch size of training or evaluation."""

    ref_model_init_kwargs: dict[str, Any] | str | None = None
    """Keyword arguments of `from_pretrained` for a `ref_model` that is given by name."""

    model_adapter_name: str | None = None
    """Name of the adapter to train. None: the active one."""

    ref_adapter_name: str | None = None
    """Name of the adapter that serves as reference."""

    force_use_ref_model: bool = False
    """Do not warn of `ref_model` together with `peft_config`, where the model without its adapter could be the reference."""

    padding_free: bool = False
    """For older scripts: layout="auto" avoids padding wherever the model can. An error with layout="padded"."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*ReferenceConfig._VALID_DICT_FIELDS, "ref_model_init_kwargs"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError(
                "sync_ref_model updates the reference during training, but precompute_ref_log_probs computes its "
                "log-probabilities only once: choose one."
            )
        if self.padding_free and self.layout == "padded":
            raise ConfigError("padding_free=True contradicts layout='padded': leave one of them out.")


class PreferenceTrainer(PredictsRewards):
    """Base of the trainers with a reference.

    ref_model         the reference, a model or its name; by default the initial policy
    compute_metrics   computes metrics of an evaluation from its rewards: see `trl.trainers.reward_predictions`
    """

    kinds: ClassVar[tuple[str, ...]]
    keep_columns: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: EvalRows = None,
        processing_class: Any = None,
        **keywords: Unpack[PreferenceKeywords],
    ) -> None:
        self.ref_model = ref_model
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **keywords)
        add_eval_samples(self)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return True

    @property
    def needs_online_reference(self) -> bool:
        """Whether the loss also needs the reference on completions other than the rows' own, which cannot be precomputed."""
        return False

    def encode_settings(self, split: str) -> EncodeSettings:
        args = self.args
        return EncodeSettings(
            kind=self.kinds,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            needs_prompt=True,
            keep_columns=self.keep_columns,
            encoder_decoder=unwrap(self.model).config.is_encoder_decoder,
            num_proc=args.dataset_num_proc,
        )

    # ---- the reference ----

    def _resolve_model(self, model: Any, quantization_config: Any, peft_config: Any) -> nn.Module:
        self._check_ref_model(model, peft_config)
        if isinstance(model, PeftModel):
            self._choose_adapters(model)
        elif self.args.ref_adapter_name is not None or self.args.model_adapter_name is not None:
            raise ConfigError(
                "model_adapter_name and ref_adapter_name choose among the adapters of a model, but this one has "
                "none: give a PeftModel with both loaded, or leave the names out."
            )
        self._has_new_adapter = peft_config is not None
        return super()._resolve_model(model, quantization_config, peft_config)

    def _check_ref_model(self, model: Any, peft_config: Any) -> None:
        if self.ref_model is None:
            return
        if self.ref_model is model and not isinstance(model, str):
            raise ConfigError(
                "model and ref_model are the same object, so training one would change the other. Leave ref_model out: "
                "the reference is then a copy of the initial model."
            )
        if not self.needs_reference:
            raise ConfigError(
                f"ref_model was given, but loss_type={self.args.loss_type!r} uses no reference: leave it out."
            )
        if peft_config is not None and not self.args.force_use_ref_model:
            logger.warning(
                "ref_model was given together with peft_config, and takes memory of its own. Without ref_model, the reference is "
                "the model without the new adapter. To use another model without this warning, set force_use_ref_model=True."
            )
        if self.args.ref_adapter_name is not None:
            raise ConfigError("ref_model and ref_adapter_name both name the reference: give one of them.")

    def _choose_adapters(self, model: PeftModel) -> None:
        for option in ("model_adapter_name", "ref_adapter_name"):
            name = getattr(self.args, option)
            if name is not None and name not in model.peft_config:
                raise ConfigError(f"{option}: {unknown('adapter', name, model.peft_config)}")
        if self.args.model_adapter_name is not None:
            model.set_adapter(self.args.model_adapter_name)
        if self.args.ref_adapter_name == model.active_adapter:
            raise ConfigError(
                f"ref_adapter_name={self.args.ref_adapter_name!r} is the adapter that is trained. Load it a second "
                "time under another name, or leave ref_adapter_name out: the reference is then the adapter as given."
            )

    def prepare_model(self) -> None:
        super().prepare_model()
        moved_or_kept = self.args.sync_ref_model or self.args.precompute_ref_log_probs
        if moved_or_kept and not self.needs_reference:
            raise ConfigError(
                f"loss_type={self.args.loss_type!r} uses no reference: leave out sync_ref_model and "
                "precompute_ref_log_probs."
            )
        if self.needs_reference:
            self._compare_with(self._make_reference())
            if self.args.precompute_ref_log_probs:
                self._precompute()

    def _make_reference(self) -> Reference:
        args = self.args
        if args.ref_adapter_name is not None:
            return NamedAdapter(self.model.active_adapter, args.ref_adapter_name)
        computed_once = args.precompute_ref_log_probs and not self.needs_online_reference
        if self.ref_model is None and computed_once and not isinstance(self.model, PeftModel):
            return FrozenModel(self.model)
        loading = args.loading(args.ref_model_init_kwargs)
        if args.ref_model_init_kwargs and not isinstance(self.ref_model, str):
            logger.warning("ref_model_init_kwargs has no effect, since no ref_model is given by name: leave it out.")
        given, new = self.ref_model, self._has_new_adapter
        return reference_for(self.model, given, args, self.accelerator, has_new_adapter=new, loading=loading)

    def with_reference(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with the signal `ref_logprobs [N,C]`."""
        if self.reference is None:
            return batch
        found = self.reference.logprobs(model, batch)
        return replace(batch, signals={**batch.signals, "ref_logprobs": found})

    def _precompute(self) -> None:
        args = self.args
        if self.train_dataset is not None:
            size = args.precompute_ref_batch_size or args.per_device_train_batch_size
            self.train_dataset = with_reference_logprobs(
                self, self.reference, self.train_dataset, name="train", batch_size=size
            )
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        if isinstance(self.eval_dataset, Mapping):
            sets = self.eval_dataset.items()
            self.eval_dataset = {
                n: with_reference_logprobs(self, self.reference, r, name=n, batch_size=size) for n, r in sets
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = with_reference_logprobs(
                self, self.reference, self.eval_dataset, name="eval", batch_size=size
            )
        keeps = self.needs_online_reference or not isinstance(self.reference, FrozenModel)
        self.reference = Precomputed(self.reference if keeps else None)
        self.ref_model = self.ref_model if keeps else None
