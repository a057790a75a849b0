"""Load saved adapters. Wherever a model is named, the folder of an adapter stands for its base model with that adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, load_peft_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from trl.errors import ModelError, ModelNotFoundError
from trl.models.adapters import is_classifier, name_of, prepared, put_on
from trl.models.not_found import explain_missing

OF_ONE_MODEL = ("revision", "subfolder")
HUB_OPTIONS = (*OF_ONE_MODEL, "cache_dir", "force_download", "local_files_only", "token")
"""Keyword arguments of `from_pretrained` that say where the files of a model are: the weights, but also configuration,
tokenizer and heads. Those of `OF_ONE_MODEL` hold for one of an adapter and its base model, the others for both."""


def hub_options(given: Mapping[str, Any], *, of_another: bool = False) -> dict[str, Any]:
    """The `HUB_OPTIONS` among `given` that are set; with `of_another`, those that also hold for another model's files."""
    names = [name for name in HUB_OPTIONS if not (of_another and name in OF_ONE_MODEL)]
    return {name: given[name] for name in names if given.get(name) is not None}


def is_adapter(name: str, **hub: Any) -> bool:
    """Whether a folder or a hub repository holds an adapter. `hub` are options of the download."""
    if Path(name).is_dir():  # where older releases of `transformers` do not read `subfolder`
        return Path(name, hub.get("subfolder", ""), CONFIG_NAME).is_file()
    return find_adapter_config_file(name, **hub) is not None


def base_of(adapter: str, **hub: Any) -> str:
    """Name of an adapter's base model. Raises ModelError if the adapter names none, or a folder that does not exist."""
    base = PeftConfig.from_pretrained(adapter, **hub).base_model_name_or_path
    if not base:
        raise ModelError(
            f"The adapter {adapter!r} does not name its base model: give the adapter as adapter_name_or_path, and its base "
            "model as model_name_or_path."
        )
    if base.startswith(("/", "./", "../", "~")) and not Path(base).expanduser().is_dir():
        raise ModelError(
            f"The base model of the adapter {adapter!r} is the folder {base!r}, which does not exist. Give the base model as "
            "model_name_or_path and the adapter as adapter_name_or_path; or correct base_model_name_or_path in its "
            "adapter_config.json."
        )
    return base


def with_adapter_of(model: PreTrainedModel, adapter: str, *, trainable: bool = True, **hub: Any) -> PeftModel:
    """`model` with the adapter of a folder or hub repository. Embeddings are enlarged if the adapter has more tokens.

    With `trainable`, the adapter can be trained further, and a quantised base is prepared for training; else all is frozen.
    Raises ModelError if the adapter does not fit this model.
    """
    config, state = _config_for(model, adapter, hub), load_peft_weights(adapter, device="cpu", **hub)
    config.inference_mode = not trainable
    if trainable:
        model = prepared(model)
    _grow_vocabulary(model, config, state)
    tied = _tied_tables(model)
    try:
        adapted = put_on(model, config)
        # A reward model on a language model's adapter gets a new head, as it does on the language model itself.
        heads = get_peft_model_state_dict(adapted, save_embedding_layers=False) if is_classifier(model) else {}
        found = set_peft_model_state_dict(adapted, {**heads, **state})
    except (RuntimeError, ValueError, KeyError) as error:
        raise _unfit(adapter, model, str(error)) from error
    known = ("prompt_embeddings",) if config.is_prompt_learning else ()
    if unknown := [key for key in found.unexpected_keys if key not in known and not _is_copy(key, state, tied)]:
        raise _unfit(adapter, model, f"the model has no {unknown[0]}")
    adapted._trl_source = adapter
    return adapted if trainable else adapted.requires_grad_(False)


def _tied_tables(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the language-model head and the input embeddings if they share one weight, else None."""
    head = model.get_output_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return None
    return name_of(model, head), name_of(model, model.get_input_embeddings())


def _is_copy(key: str, state: Mapping[str, Tensor], tied: tuple[str, str] | None) -> bool:
    """Whether the tensor `key` of a tied head was saved a second time under the name of the embeddings."""
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
    """`model`, on the device "meta", with a trainable adapter of the same shape as the saved one."""
    config = _config_for(model, adapter, hub)
    config.inference_mode = False
    _grow_vocabulary(model, config, load_peft_weights(adapter, device="cpu", **hub))
    return put_on(model, config)


def _config_for(model: PreTrainedModel, adapter: str, hub: Mapping[str, Any]) -> PeftConfig:
    """Read the configuration of an adapter. On a reward model, the head becomes part of what is trained and saved.

    Raises ModelError for a reward model's adapter on a language model, ModelNotFoundError if there is no adapter.
    """
    folder = Path(adapter, hub.get("subfolder") or "")
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ModelNotFoundError(
            f"adapter={adapter!r} is the folder of a whole model, not of an adapter: it has no adapter_config.json."
        )
    with explain_missing(adapter, f"adapter={adapter!r}", hub.get("subfolder")):
        config = PeftConfig.from_pretrained(adapter, **hub)
    if is_classifier(model):
        config.task_type = TaskType.SEQ_CLS
    elif config.task_type == TaskType.SEQ_CLS:
        raise ModelError(f"{adapter!r} is the adapter of a reward model: it gives scores and cannot generate text.")
    return config


def _grow_vocabulary(model: PreTrainedModel, config: PeftConfig, state: Mapping[str, Tensor]) -> None:
    """Enlarge the embeddings of `model` to the vocabulary that an adapter's saved embeddings or trained tokens need."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name_of(model, table) for table in tables if table is not None]
    whole = tuple(f".{name}.{inside}weight" for name in names for inside in ("", "token_adapter.base_layer."))
    sizes = [len(value) for key, value in state.items() if key.endswith(whole)]
    trained = config.to_dict().get("trainable_token_indices") or {}
    sizes += [1 + max(ids) for ids in (trained.values() if isinstance(trained, dict) else [trained])]
    if max(sizes, default=0) > tables[0].num_embeddings:
        model.resize_token_embeddings(max(sizes), mean_resizing=False)
