"""Load models and tokenizers for commands that do not train."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from trl.cli.hub import check_model_on_hub
from trl.errors import ConfigError
from trl.models.config import ModelConfig, get_quantization_config
from trl.models.load import load_model, load_processor, processor_source

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that spread the weights over all devices."""


def load_pretrained(model: ModelConfig, *, device: str = "auto") -> tuple[Any, Any]:
    """Load the model that the options name, with its adapter and quantisation, and its tokenizer or processor."""
    check_model_on_hub(model.model_name_or_path, model.model_revision)
    loaded = load_model(
        model.model_name_or_path,
        quantization_config=get_quantization_config(model),
        trust_remote_code=model.trust_remote_code,
        trainable=False,
        **model.init_kwargs(),
        **placement(device),
    )
    inner = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
    source = processor_source(model.model_name_or_path, model.init_kwargs())
    return loaded, load_processor(inner, trust_remote_code=model.trust_remote_code, **source)


def placement(device: str) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` that put the weights on `device`. Raises ConfigError if it does not
    exist."""
    if device == "auto" and not torch.accelerator.is_available():
        return {}
    if device in MAPS:
        return {"device_map": device}
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(
            f"device={device!r} is not a device: give auto, cpu, cuda or cuda:1, for instance."
        ) from error
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind not in ("cpu", there and there.type):
        raise ConfigError(
            f"device={device!r} does not exist on this machine. Leave it out, or give {there.type if there else 'cpu'}."
        )
    return {"device_map": device}
