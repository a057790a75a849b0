"""Models and their tokenizers, as commands that train nothing load them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from trl.cli.hub import check_model_on_hub
from trl.errors import ConfigError
from trl.models.config import ModelConfig, get_quantization_config
from trl.models.load import load_model, load_processor

MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which weights are spread over all devices."""


def load_pretrained(model: ModelConfig, *, device: str = "auto") -> tuple[Any, Any]:
    """The model that the options name, with its adapter, quantised if they say so, and its tokenizer or processor."""
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
    name, trust = model.model_name_or_path, model.trust_remote_code
    return loaded, load_processor(inner, name, trust_remote_code=trust, **model.hub)


def placement(device: str) -> dict[str, Any]:
    """Where `from_pretrained` puts the weights."""
    if device == "auto" and not torch.accelerator.is_available():
        return {}
    if device in MAPS:
        return {"device_map": device}
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no device: give auto, cpu, cuda or cuda:1, for instance.") from error
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind not in ("cpu", there and there.type):
        raise ConfigError(
            f"device={device!r}: there is none here. Leave it out, or give {there.type if there else 'cpu'}."
        )
    return {"device_map": device}
