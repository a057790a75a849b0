"""Models by name, as commands that train nothing load them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from trl.cli.hub import check_model_on_hub
from trl.cli.parser import ParsedOptions
from trl.cli.train import check_model, check_weights
from trl.models.config import ModelConfig, get_quantization_config
from trl.models.load import load_model, load_processor


def load(parsed: ParsedOptions, name: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer, or its processor, by name."""
    check_weights(name := check_model(name))
    given = {"dtype": "auto", **parsed.values, "model_name_or_path": name}
    config = replace(parsed, values=given).arguments_for(ModelConfig)
    check_model_on_hub(name, config.model_revision)
    placement = {"device_map": "auto"} if torch.accelerator.is_available() else {}
    model = load_model(
        name,
        quantization_config=get_quantization_config(config),
        trust_remote_code=config.trust_remote_code,
        **{**config.init_kwargs(), **placement},
    )
    return model, load_processor(model, name, trust_remote_code=config.trust_remote_code)
