"""Weights of a checkpoint that are stored under other names than the model's own.

    model            model.language_model.layers.0. …        experts of a layer in one tensor
    checkpoint       model.layers.0. …                       a tensor for each

`save_pretrained` writes the names and shapes of the hub, for models that read images and for mixtures of experts, and
`transformers.Trainer` reads a checkpoint by the model's own: what it does not find stays as it was.
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
    """Names of the weights in a checkpoint's safetensors; empty where it has none."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not (file := folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(file, framework="pt") as stored:
        return set(stored.keys())


def are_renamed(model: nn.Module, folder: Path) -> bool:
    """Whether the checkpoint holds weights of the model under names that are not its own."""
    return isinstance(model, PreTrainedModel) and bool(stored_names(folder) - model.state_dict().keys())


def load_renamed(model: PreTrainedModel, folder: Path) -> None:
    """Read the weights as `from_pretrained` does, into this model."""
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)  # holds halves exactly
    model.load_state_dict(loaded.state_dict())
