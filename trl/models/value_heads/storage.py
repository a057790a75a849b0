"""Load value heads and reward heads from disk, in the present and in older file formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from trl.errors import ModelError
from trl.models.files import check_shards
from trl.models.load import find_file, has_file

HEAD_FILE = "value_head.safetensors"
"""File of the value head. Older checkpoints have it among the model's weights."""

VALUE_MODEL = "value_model"
"""Folder beside it with the separate network of a `ValueModel`."""

PREFIX = "v_head."


def stored_head(name: str, hub: dict[str, Any]) -> dict[str, Tensor] | None:
    """State of the value head that was saved with the model `name` (folder or hub name); None without one."""
    if (path := find_file(name, HEAD_FILE, **hub)) is not None:
        return _read(path)
    for index, whole in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        if (path := find_file(name, index, **hub)) is not None:
            check_shards(path.parent)
            shards = {
                file for key, file in json.loads(path.read_text())["weight_map"].items() if key.startswith(PREFIX)
            }
            return {k: v for shard in shards for k, v in _read(find_file(name, shard, **hub)).items()} or None
        if (path := find_file(name, whole, **hub)) is not None:
            return _read(path) or None
    return None


def has_value_model(name: str, hub: dict[str, Any]) -> bool:
    """Whether a separate value network was saved with the model `name`."""
    return has_file(name, f"{VALUE_MODEL}/{CONFIG_NAME}", **hub)


def load_value_model(name: str, hub: dict[str, Any]) -> PreTrainedModel:
    """Load the separate value network that was saved with the model `name`."""
    subfolder = "/".join(filter(None, (hub.get("subfolder"), VALUE_MODEL)))
    return AutoModel.from_pretrained(name, dtype="auto", **{**hub, "subfolder": subfolder})


def without_copies(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` (of `model` or its wrapper) without tied weights, of which gathering shards made separate copies."""
    tied = tuple(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in state.items() if not name.endswith(tied)}


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of the value head in one file, by their names in the head."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            return {key.removeprefix(PREFIX): stored.get_tensor(key) for key in stored.keys() if key.startswith(PREFIX)}  # noqa: SIM118
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def add_reward_adapter(model: PeftModel, adapter: str, name: str) -> nn.Linear:
    """Load a reward model's adapter into `model` under `name`, frozen; return the reward head.

    Raises ModelError for a model without adapters, and for an adapter that was saved without a reward head.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(
            "reward_adapter needs a policy with an adapter, so that both share one base model: pass "
            "peft_config=LoraConfig(...), or a PeftModel."
        )
    state = load_peft_weights(adapter, device="cpu")
    heads = {key: value for key, value in state.items() if key.endswith((".score.weight", ".score.bias"))}
    if not heads:
        raise ModelError(
            f"reward_adapter={adapter!r} has no 'score' head (it has {sorted(state)[:3]}, …): train it with "
            "RewardTrainer and peft_config=LoraConfig(task_type='SEQ_CLS', ...)."
        )
    config = PeftConfig.from_pretrained(adapter)
    config.modules_to_save, config.task_type, config.inference_mode = None, None, True
    model.add_adapter(name, config)
    set_peft_model_state_dict(model, {k: v for k, v in state.items() if k not in heads}, adapter_name=name)
    return _linear(heads).to(model.device)


def _linear(state: dict[str, Tensor]) -> nn.Linear:
    """A frozen linear layer with the weight, and the bias if any, in `state`."""
    parts = {key.rpartition(".")[2]: value for key, value in state.items()}
    labels, hidden = parts["weight"].shape
    head = nn.Linear(hidden, labels, bias="bias" in parts, dtype=parts["weight"].dtype)
    head.load_state_dict(parts)
    return head.requires_grad_(False)
