"""Add adapters to a model, choose their layers and new tokens, train those that a model already has, and merge them.

    y = W x + (α/r) B A x        LoRA (arXiv:2106.09685); W is frozen

`trl.models.saved_adapters` loads saved adapters.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection
from typing import Any, Literal

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl.data.chat_formats import FILLER
from trl.errors import ConfigError, ModelError, suggest
from trl.noise import without_warnings
from trl.vision.families import family_of

logger = logging.getLogger(__name__)

HEADS = ("score", "classifier", "classification_head")
"""Names of the head in sequence classifiers, which gives the reward. `modules_to_save` of an adapter may list all of them."""


def put_on(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """`model` with a new adapter."""
    with without_warnings():
        return get_peft_model(model, config, **options)


def is_classifier(model: nn.Module) -> bool:
    return "ForSequenceClassification" in type(model).__name__


AdaptedPart = Literal["language", "language_and_projector", "everything"]
"""The parts of a vision-language model that get adapters."""


def with_adapters(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, part: AdaptedPart = "language"
) -> PreTrainedModel | PeftModel:
    """`model` with a new adapter, or unchanged if `peft_config` is None. A quantised base is prepared for training.

    In a vision-language model, only `part` gets adapters, unless the configuration has `exclude_modules`.

    A model on which `transformers` itself loaded an adapter becomes a `PeftModel`. Raises ConfigError if `peft_config` is
    given for a model that has adapters already, or names layers that the model does not have.
    """
    if isinstance(model, PreTrainedModel) and model.__dict__.get("_hf_peft_config_loaded"):
        model = as_peft_model(model)
    if peft_config is None:
        return model
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a configuration of peft, such as LoraConfig(r=16), not a {type(peft_config).__name__}."
        )
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"peft_config was given, but the model already carries the adapter(s) {sorted(model.peft_config)}. Train "
            "those (leave out peft_config or --use_peft), or merge them first: `trl merge`, or model = "
            "model.merge_and_unload()."
        )
    config = copy.copy(peft_config)
    _set_task_type(config, model)
    _default_target_modules(config, model)
    _check_modules_to_save(config, model)
    _target_packed_layers(config, model)
    _exclude_other_parts(config, part, model)
    try:
        return put_on(prepared(model), config)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise ConfigError(_no_such_layer(config, model)) from error


def _no_such_layer(config: PeftConfig, model: nn.Module) -> str:
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    existing = sorted({name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, kinds)})
    asked = config.target_modules
    return (
        f"target_modules={sorted(asked) if isinstance(asked, set) else asked!r}: {type(model).__name__} has no such layer. "
        f"Its layers are {', '.join(existing)}; 'all-linear' adapts all linear layers but the head."
    )


def _exclude_other_parts(config: PeftConfig, part: AdaptedPart, model: PreTrainedModel) -> None:
    """Set `exclude_modules` to all modules of a vision-language model outside `part`.

    Raises ConfigError if the configuration names layers that exist only outside `part`.
    """
    excluded = modules_outside(model, part)
    if excluded and not config.to_dict().get("exclude_modules"):
        _check_part(config, part, excluded, model)
        config.exclude_modules = excluded
        logger.info(
            f"Adapters: on the {part.replace('_', ' ')} of {type(model).__name__}; its image encoder stays frozen."
        )


def _check_part(config: PeftConfig, part: AdaptedPart, excluded: Collection[str], model: nn.Module) -> None:
    """Raises ConfigError if a name or pattern in `target_modules` matches only modules in `excluded`."""
    named = config.to_dict().get("target_modules") or ()
    patterns = [named] if isinstance(named, str) and named != "all-linear" else []
    patterns += [rf"(.*\.)?{re.escape(name)}" for name in named] if not isinstance(named, str) else []
    inside = [name for name, module in model.named_modules() if not any(module.children()) and name not in excluded]
    for pattern in patterns:
        matches_excluded, matches_inside = (
            any(re.fullmatch(pattern, name) for name in names) for names in (excluded, inside)
        )
        if matches_excluded and not matches_inside:
            raise ConfigError(
                f"target_modules={sorted(named) if not isinstance(named, str) else named!r} names layers outside the "
                f"{part.replace('_', ' ')} of {type(model).__name__}, which adapted_part={part!r} excludes. Set "
                "adapted_part='everything', or remove those layers from target_modules."
            )


def modules_outside(model: PreTrainedModel, part: AdaptedPart) -> list[str]:
    """Names of the leaf modules of a vision-language model outside `part`; empty for other models."""
    if part == "everything" or family_of(model.config) is None:
        return []
    encoder = model.get_encoder(modality="image")
    if encoder is model:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    head = names.get(id(model.get_output_embeddings()))
    language, tower = names[id(model.get_decoder())], names[id(encoder)]

    def is_left_out(name: str) -> bool:
        if part == "language":
            return not f"{name}.".startswith(f"{language}.") and name not in (head, "score")
        return f"{name}.".startswith(f"{tower}.")

    leaves = (name for name, module in model.named_modules() if not any(module.children()))
    return [name for name in leaves if is_left_out(name)]


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a quantised model for training adapters; return others unchanged."""
    if model.__dict__.get("is_loaded_in_4bit") or model.__dict__.get("is_loaded_in_8bit"):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _set_task_type(config: PeftConfig, model: PreTrainedModel) -> None:
    """Set `task_type` by the model's architecture if the configuration has none."""
    if config.task_type is None and is_classifier(model):
        config.task_type = TaskType.SEQ_CLS
    elif config.task_type is None and model.can_generate():
        config.task_type = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def _check_modules_to_save(config: PeftConfig, model: nn.Module) -> None:
    """Raises ConfigError if `modules_to_save` names a layer that the model does not have, which peft ignores silently."""
    heads = HEADS if config.task_type == TaskType.SEQ_CLS else ()
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in config.to_dict().get("modules_to_save") or ():
        if name.rpartition(".")[2] not in ends and name not in heads:
            raise ConfigError(
                f"modules_to_save names {name!r}, and {type(model).__name__} has no such layer.{suggest(name, ends)}"
            )


def _default_target_modules(config: PeftConfig, model: nn.Module) -> None:
    """Set `target_modules` of LoRA to all linear layers if none are named and peft has no default for the architecture."""
    named = not isinstance(config, LoraConfig) or config.target_modules or config.target_parameters
    architecture = model.config.model_type
    if not named and architecture not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        config.target_modules = "all-linear"
        logger.info(f"Adapters: on all linear layers, since peft has no default target_modules for {architecture!r}.")


def _target_packed_layers(config: PeftConfig, model: nn.Module) -> None:
    """Make "all-linear" include the quantised layers of GPTQ and AWQ, which are not `nn.Linear`."""
    packed = {name for name, module in model.named_modules() if "qweight" in dict(module.named_buffers(recurse=False))}
    if packed and vars(config).get("target_modules") == "all-linear":
        config.target_modules = packed


def as_peft_model(model: PreTrainedModel) -> PeftModel:
    """Convert a model with an adapter that `AutoModel.from_pretrained` loaded from an adapter's folder to a `PeftModel`.

    The adapter is trainable. Raises ConfigError if the model has several adapters.
    """
    if len(model.peft_config) > 1:
        raise ConfigError(
            f"This {type(model).__name__} has several adapters, {sorted(model.peft_config)}, loaded by transformers: load the "
            "model with peft.PeftModel.from_pretrained, and select the one to train with set_adapter."
        )
    ((name, config),) = model.peft_config.items()
    _check_magnitudes(model, config)
    # The method that transformers has for this needs a release of peft that is not out yet.
    found = get_peft_model_state_dict(model, adapter_name=name)
    state = {f"base_model.model.{key}": value for key, value in found.items()}
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(path, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(path, module.original_module)
    del model.peft_config
    model._hf_peft_config_loaded = False
    config = copy.copy(config)
    config.inference_mode = False
    _set_task_type(config, model)
    adapted = put_on(prepared(model), config, adapter_name=name)
    set_peft_model_state_dict(adapted, state, adapter_name=name)
    return adapted


def _check_magnitudes(model: nn.Module, config: PeftConfig) -> None:
    """Raises ModelError if `transformers` did not load the magnitudes of a DoRA adapter, as in some releases.

    The magnitudes then still have their initial values, the norms of the base weights, although B is not zero any more.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)] if config.to_dict().get("use_dora") else []
    for layer in layers:
        for name, magnitude in vars(layer)["_modules"].get("lora_magnitude_vector", {}).items():
            weight = layer.get_base_layer().weight
            if layer.lora_B[name].weight.any() and torch.allclose(magnitude.weight, weight.norm(dim=1)):
                raise ModelError(
                    "transformers loaded this DoRA adapter without its magnitudes: pass the name of the adapter's folder in "
                    "place of the model, or load the model with peft.PeftModel.from_pretrained."
                )


def prompt_adapter(model: nn.Module) -> str | None:
    """The kind of the active adapter, such as PROMPT_TUNING, if it learns a prompt; None if it changes weights."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config.peft_type.value if config is not None and config.is_prompt_learning else None


def wrapped_layer(module: nn.Module) -> nn.Module:
    """The original layer inside a peft wrapper, or `module` itself if it is not wrapped."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


# ---- new tokens ----


def new_tokens(model: PreTrainedModel, tokenizer: Any, added: Collection[int] = ()) -> list[int]:
    """Ids of tokens that the model was not trained with: `added`, and those beyond the vocabulary of the saved model."""
    first = _stored_vocabulary(model.config) or len(tokenizer)
    rows = len(wrapped_layer(model.get_input_embeddings()).weight)
    ids = range(first, min(len(tokenizer), rows))
    known = [i for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if FILLER not in token]
    return sorted({*added, *known})


def _stored_vocabulary(config: PreTrainedConfig) -> int | None:
    """Vocabulary size in the configuration that a model was loaded with (folder or hub cache); None if it was not loaded."""
    if not config._name_or_path:
        return None
    try:
        stored = type(config).from_pretrained(config._name_or_path, local_files_only=True)
    except OSError:  # a configuration whose name was set by hand
        return None
    return getattr(stored.get_text_config(), "vocab_size", None)


def with_trained_tokens(model: PeftModel, ids: Collection[int]) -> PeftModel:
    """Recreate the new adapter of `model` so that it trains the embeddings and logits of the tokens `ids` as well.

    Without that, tokens that a chat template adds keep their random initial embeddings, and the model never learns to end
    a turn. Only LoRA supports it: other adapters are returned unchanged, with a warning.
    """
    name = model.active_adapter
    config = copy.copy(model.peft_config[name])
    if not ids:
        return model
    if not isinstance(config, LoraConfig):
        logger.warning(
            f"{len(ids)} tokens are new to the model ({list(ids)[:5]}, …), and a {config.peft_type.value} adapter does not train "
            "their embeddings: use LoRA, or a model that was trained with these tokens."
        )
        return model
    logger.info(f"{len(ids)} tokens are new: their embeddings and logits train with the adapter.")
    config.trainable_token_indices = _tables(model, config, ids)
    if config.trainable_token_indices == model.peft_config[name].trainable_token_indices:
        return model
    base = model.unload()
    vars(base).pop("peft_config", None)
    return put_on(base, config, adapter_name=name)


def _tables(model: PeftModel, config: LoraConfig, ids: Collection[int]) -> dict[str, list[int]] | None:
    """`trainable_token_indices`: `ids` and those already given, by name of the embeddings and of an untied head.

    None if `modules_to_save` trains these layers in full.
    """
    base = model.get_base_model()
    embeddings = name_of(base, base.get_input_embeddings())
    tables = {embeddings}
    if not base.config.get_text_config().tie_word_embeddings:
        tables.add(name_of(base, base.get_output_embeddings()))
    tables -= set(config.modules_to_save or ())
    given = config.trainable_token_indices or {}
    given = given if isinstance(given, dict) else {embeddings: given}
    return {table: sorted({*given.get(table, ()), *ids}) for table in sorted(tables)} or None


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module).rpartition(".")[2]


# ---- merging ----


def merged(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter added to its weights: W + (α/r) B A.

    Raises ModelError for a quantised base, whose weights would round the sum, and for adapters that learn a prompt.
    """
    base = model.get_base_model()
    if base.__dict__.get("is_loaded_in_4bit") or base.__dict__.get("is_loaded_in_8bit"):
        raise ModelError(
            "Merging into quantised weights would round away what the adapter learned: load the model without "
            "load_in_4bit/8bit."
        )
    kind = model.peft_config[model.active_adapter]
    if kind.is_prompt_learning:
        raise ModelError(
            f"A {kind.peft_type.value} adapter learns a prompt and changes no weights: it cannot be merged."
        )
    return model.merge_and_unload(safe_merge=True)


def trains(model: nn.Module) -> bool:
    """Whether any parameter trains."""
    return any(parameter.requires_grad for parameter in model.parameters())


def thaw(model: PeftModel) -> None:
    """Make the active adapter of a model that was loaded for inference trainable. Raises ModelError if that has no effect."""
    adapter = model.active_adapter
    logger.warning(f"Adapter {adapter!r} was loaded frozen (is_trainable=False): it is unfrozen for training.")
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name or f".{adapter}" == name[-len(adapter) - 1 :]:
            parameter.requires_grad_(True)
    if not trains(model):
        raise ModelError(f"Nothing trains: adapter {adapter!r} ({model.peft_config[adapter].peft_type}) is frozen.")
