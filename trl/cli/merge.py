"""`trl merge`: merge a LoRA adapter into its base model, W + (α/r) B A.

trl merge --model_name_or_path qwen-sft --output_dir qwen-sft-merged
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.cli.hub import FILES, check_model_on_hub
from trl.cli.parser import ParsedOptions
from trl.cli.train import library_errors_as_config_errors, model_to_load
from trl.errors import ConfigError
from trl.models.config import ModelConfig


@dataclass
class MergeArguments:
    """Where the merged model is saved."""

    output_dir: str
    """Folder that the merged model is written to."""

    push_to_hub: bool = False
    """Upload the merged model as well."""

    hub_model_id: str | None = None
    """Repository to upload to. None: the name of `output_dir`, in your own namespace."""

    hub_private_repo: bool | None = None
    """Make the repository private. None: public, unless your organisation's default is private."""


def run(arguments: MergeArguments, given: ParsedOptions) -> int:
    model = model_to_load(given)
    if there := [name for name in FILES if (Path(arguments.output_dir) / name).exists()]:
        raise ConfigError(
            f"output_dir={arguments.output_dir!r} already holds a model ({there[0]}): give another folder."
        )
    check_model_on_hub(model.model_name_or_path, model.model_revision)
    with library_errors_as_config_errors():
        merge(model, arguments)
    return 0


def merge(model: ModelConfig, arguments: MergeArguments) -> None:
    """Write the merged model and its tokenizer to `output_dir`, and push both with `push_to_hub`.

    The sum is computed in float32 and rounded once, to `dtype`; "auto" is the precision in which the base was saved.
    Raises ConfigError for a model without an adapter.
    """
    from transformers import logging

    from trl.models.adapters import merged
    from trl.models.files import follow_umask
    from trl.models.load import load_processor, processor_source
    from trl.models.value_heads.auto_models import WithValueHead

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded, precision = load_adapted(model)
    has_head = isinstance(loaded, WithValueHead)
    whole = merged(loaded.pretrained_model if has_head else loaded).to(precision)
    source = processor_source(model.model_name_or_path, model.init_kwargs())
    processor = load_processor(whole, trust_remote_code=model.trust_remote_code, **source)
    if has_head:
        loaded.pretrained_model, whole = whole, loaded
    whole.save_pretrained(arguments.output_dir)
    follow_umask(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    print(f"The merged model is in {arguments.output_dir}.", file=sys.stderr)
    if arguments.push_to_hub:
        repository = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
        for each in (whole, processor):
            each.push_to_hub(repository, private=arguments.hub_private_repo)


def load_adapted(model: ModelConfig) -> tuple[Any, Any]:
    """Load the model with its adapter in float32. Return it, and the dtype to save it in."""
    from peft import PeftConfig, TaskType
    from transformers import AutoModelForSequenceClassification

    from trl.cli.preview import dtype_of
    from trl.models.load import load_config, load_model
    from trl.models.saved_adapters import is_adapter
    from trl.models.value_heads.auto_models import value_head_class
    from trl.models.value_heads.storage import stored_head

    hub, name, adapter = model.hub, model.model_name_or_path, model.adapter_name_or_path
    if adapter is None and not is_adapter(name, **hub):
        raise ConfigError(
            f"model_name_or_path={name!r} is a whole model, not an adapter: there is nothing to merge. Give the folder of "
            "an adapter, or add one with --adapter_name_or_path."
        )
    base = load_config(name, trust_remote_code=model.trust_remote_code, **hub)
    precision = dtype_of(model.dtype, base)
    kwargs = {"trust_remote_code": model.trust_remote_code, "dtype": "float32", **hub}
    if adapter is not None:
        kwargs["adapter"] = adapter
    task = PeftConfig.from_pretrained(adapter or name, **({} if adapter else hub)).task_type
    if task == TaskType.SEQ_CLS:
        return load_model(name, auto_class=AutoModelForSequenceClassification, num_labels=1, **kwargs), precision
    if adapter is None and stored_head(name, hub) is not None:
        return value_head_class(base).from_pretrained(name, **kwargs), precision
    return load_model(name, **kwargs), precision
