"""`trl preview [METHOD] …`: show rows as a training command with the same options would see them.

This makes the real trainer on a model without weights, so rows are processed as in training, but nothing large is
loaded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from trl.cli.commands import Method, load
from trl.cli.parser import ParsedOptions
from trl.cli.train import Run, check_hub, datasets_of, library_errors_as_config_errors, own_keywords, read_run
from trl.data.places import naming_lines
from trl.errors import ConfigError

if TYPE_CHECKING:
    from trl.trainers.base import BaseTrainer


@dataclass
class PreviewArguments:
    """Options of `trl preview` itself, beside those of the training command."""

    rows: int = 3
    """How many rows to show."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows={self.rows}: give 1 or more.")


def run(arguments: PreviewArguments, given: ParsedOptions, method: Method) -> int:
    run = read_run(method, given)
    check_hub(run)
    with library_errors_as_config_errors():
        trainer = trainer_without_weights(run)
    trainer.preview(arguments.rows)
    return 0


def trainer_without_weights(run: Run, rows: Any = None, **keywords: Any) -> BaseTrainer:
    """Make the trainer of a run on a model without weights, and encode its training rows, or `rows` in their place.

    `keywords` are further arguments of the trainer.
    """
    trainer_class, keywords = load(run.method.trainer), own_keywords(run) | keywords
    model = model_without_weights(run, trainer_class.auto_class)
    train_dataset = datasets_of(run)[0] if rows is None else rows
    # Trainers create their output folder: a preview must leave none behind. It prints the row counts that this logger
    # would.
    with TemporaryDirectory() as folder, _silent("trl.data.encode"):
        args = copy.copy(run.training)
        args.output_dir, args.model_init_kwargs = folder, None
        keywords.setdefault("processing_class", processor_of(run, model))
        with naming_lines(run.script, run.mixture):
            return without_weights(trainer_class)(model=model, args=args, train_dataset=train_dataset, **keywords)


def model_without_weights(run: Run, auto_class: Any = None) -> Any:
    """The model of a run, with its adapter if it has one, on the "meta" device."""
    import torch

    from trl.models.attention_packages import check_attention
    from trl.models.load import language_model_class, load_config
    from trl.models.saved_adapters import hub_options, is_adapter, with_shape_of

    name, trust = run.model.model_name_or_path, run.training.trust_remote_code
    hub = hub_options(run.training.model_init_kwargs or {})
    config = load_config(name, trust_remote_code=trust, **hub)
    config.num_labels = 1  # reward models have one output
    kwargs = {"dtype": dtype_of(run.model.dtype, config), "trust_remote_code": trust}
    if (attention := (run.training.model_init_kwargs or {}).get("attn_implementation")) is not None:
        check_attention(attention)
        kwargs["attn_implementation"] = attention
    with torch.device("meta"):
        model = (auto_class or language_model_class(config)).from_config(config, **kwargs)
        if run.model.adapter_name_or_path is not None:
            return with_shape_of(model, run.model.adapter_name_or_path)
        return with_shape_of(model, name, **hub) if is_adapter(name, **hub) else model


def processor_of(run: Run, model: Any) -> Any:
    """The tokenizer or processor of a run's model."""
    from trl.models.load import load_processor, processor_source
    from trl.models.score import unwrap

    source = processor_source(run.model.model_name_or_path, run.training.model_init_kwargs or {})
    return load_processor(unwrap(model), trust_remote_code=run.training.trust_remote_code, **source)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Disable a logger."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def dtype_of(name: str | None, config: Any) -> Any:
    """The dtype in which weights are loaded."""
    import torch

    saved = config.dtype or torch.float32
    return saved if name in (None, "auto") else vars(torch)[name]


def without_weights(trainer_class: type[BaseTrainer]) -> type[BaseTrainer]:
    from trl.models.reference import FrozenModel, Precomputed

    class WithoutWeights(trainer_class):
        """Neither prepares nor moves the model, because it has no weights."""

        plain_prepare_model = trainer_class.prepare_model

        def prepare_model(self) -> None:
            self.accelerator.device_placement = False

        def _precompute(self) -> None:
            """Compute no reference log-probabilities, which need weights; keep the reference only if it runs in
            training."""
            keeps = self.needs_online_reference or not isinstance(self.reference, FrozenModel)
            self.reference = Precomputed(self.reference if keeps else None)
            self.ref_model = self.ref_model if keeps else None

        def keep_reference(self, reference: Any, **_: Any) -> None:
            """Save nothing."""

        def _move_model_to_device(self, model: Any, device: Any) -> Any:
            return model

    return WithoutWeights
