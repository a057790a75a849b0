"""Adapters that were saved: a folder, or a repository, that holds one stands for its base model with the adapter on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from trl.errors import ModelError, ModelNotFoundError
from trl.models.adapters import is_classifier, name_of, prepared, put_on
from trl.models.names import explain_missing

HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir")


def is_adapter(name: str, **hub: Any) -> bool:
    """Whether a folder, or a repository of the hub, holds an adapter. `hub` are options of its download."""
    return (
        find_adapter_config_file(name, **{key: value for key, value in hub.items() if key != "subfolder"}) is not None
    )


def base_of(adapter: str, **hub: Any) -> str:
    """The model that an adapter was trained on. Raises ModelError where it does not say, or names a folder that is gone."""
    base = PeftConfig.from_pretrained(adapter, **hub).base_model_name_or_path
    if not base:
        raise ModelError(
            f"{adapter!r} is an adapter that does not say of which model: give it as adapter_name_or_path, and the model "
            "as model_name_or_path."
        )
    if base.startswith(("/", "./", "../", "~")) and not Path(base).expanduser().is_dir():
        raise ModelError(
            f"{adapter!r} is an adapter of the model {base!r}, and there is no such folder. Give the model as model_name_or_path, "
            "and the adapter as adapter_name_or_path; or mend base_model_name_or_path in its adapter_config.json."
        )
    return base


def with_adapter_of(model: PreTrainedModel, adapter: str, *, trainable: bool = True, **hub: Any) -> PeftModel:
    """`model` with the adapter that a folder or repository holds; its vocabulary grows to that of the adapter.

    With `trainable`, the adapter trains on, and a quantised base is prepared for that. Raises ModelError where the
    adapter is not of this model.
    """
    config, state = _config_for(model, adapter, hub), load_peft_weights(adapter, device="cpu", **hub)
    config.inference_mode = not trainable
    if trainable:
        model = prepared(model)
    _grow_vocabulary(model, config, state)
    tied = _tied_tables(model)
    try:
        adapted = put_on(model, config)
        # The head of a reward model on a language model's adapter is new, as it is on a language model.
        heads = get_peft_model_state_dict(adapted, save_embedding_layers=False) if is_classifier(model) else {}
        found = set_peft_model_state_dict(adapted, {**heads, **state})
    except (RuntimeError, ValueError, KeyError) as error:
        raise _unfit(adapter, model, str(error)) from error
    known = ("prompt_embeddings",) if config.is_prompt_learning else ()
    if unknown := [key for key in found.unexpected_keys if key not in known and not _is_copy(key, state, tied)]:
        raise _unfit(adapter, model, f"it has no {unknown[0]}")
    adapted._trl_source = adapter
    return adapted if trainable else adapted.requires_grad_(False)


def _tied_tables(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the head and the embeddings, where they are one table."""
    head = model.get_output_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return None
    return name_of(model, head), name_of(model, model.get_input_embeddings())


def _is_copy(key: str, state: Mapping[str, Tensor], tied: tuple[str, str] | None) -> bool:
    """Whether a tensor of the head was saved for the embeddings too, which a model with `tied` ones has once."""
    if tied is None:
        return False
    end = key.partition(f".{tied[0]}.")[2]
    twins = (name for name in state if name != key and f".{tied[1]}." in name and name.endswith(end))
    return any(torch.equal(state[twin], state[key]) for twin in twins)


def _unfit(adapter: str, model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"The adapter {adapter!r} does not fit {type(model).__name__} {model.config._name_or_path!r}: {why}"
    )


def with_shape_of(model: PreTrainedModel, adapter: str, **hub: Any) -> PeftModel:
    """`model`, on the device "meta", with an adapter of that shape, which trains."""
    config = _config_for(model, adapter, hub)
    config.inference_mode = False
    _grow_vocabulary(model, config, load_peft_weights(adapter, device="cpu", **hub))
    return put_on(model, config)


def _config_for(model: PreTrainedModel, adapter: str, hub: Mapping[str, Any]) -> PeftConfig:
    """The configuration of an adapter, for a reward model with a head that trains and is saved with it.

    Raises ModelError for a reward model's adapter on a language model.
    """
    folder = Path(adapter, hub.get("subfolder") or "")
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"adapter={adapter!r} is a model, and holds no adapter: adapter_config.json is missing."
        )
    with explain_missing(adapter, f"adapter={adapter!r}", hub.get("subfolder")):
        config = PeftConfig.from_pretrained(adapter, **hub)
    if is_classifier(model):
        config.task_type = TaskType.SEQ_CLS
    elif config.task_type == TaskType.SEQ_CLS:
        raise ModelError(f"{adapter!r} is the adapter of a reward model: it gives scores, and writes no text.")
    return config


def _grow_vocabulary(model: PreTrainedModel, config: PeftConfig, state: Mapping[str, Tensor]) -> None:
    """Give `model` as many tokens as the embeddings that were saved with an adapter have, or the tokens that it trains."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name_of(model, table) for table in tables if table is not None]
    whole = tuple(f".{name}.{inside}weight" for name in names for inside in ("", "token_adapter.base_layer."))
    sizes = [len(value) for key, value in state.items() if key.endswith(whole)]
    trained = config.to_dict().get("trainable_token_indices") or {}
    sizes += [1 + max(ids) for ids in (trained.values() if isinstance(trained, dict) else [trained])]
    if max(sizes, default=0) > tables[0].num_embeddings:
        model.resize_token_embeddings(max(sizes), mean_resizing=False)
