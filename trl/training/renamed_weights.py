"""Load checkpoints whose weights are stored under other names than the model's own.

    model            model.language_model.layers.0. …        all experts of a layer in one tensor
    checkpoint       model.layers.0. …                       one tensor per expert

For vision-language models and mixtures of experts, `save_pretrained` writes names and shapes as on the hub. But
`transformers.Trainer` loads a checkpoint by the model's own names, and silently leaves weights unchanged that it does not find.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def stored_names(folder: Path) -> set[str]:
    """Names of the weights in a checkpoint's safetensors files; empty if it has none."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not (file := folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(file, framework="pt") as stored:
        return set(stored.keys())


def are_renamed(model: nn.Module, folder: Path) -> bool:
    """Whether the checkpoint has weights under names that the model does not have."""
    return isinstance(model, PreTrainedModel) and bool(stored_names(folder) - model.state_dict().keys())


def load_renamed(model: PreTrainedModel, folder: Path) -> None:
    """Load the checkpoint's weights into this model, with the name conversion of `from_pretrained`."""
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)  # float32 represents half precision exactly
    model.load_state_dict(loaded.state_dict())
