"""Adapters in memory: new ones, their layers and tokens, and what becomes of a model that is given with them.

    y = W x + (α/r) B A x        LoRA (arXiv:2106.09685); W stays as it is

Those that were saved are read in `trl.models.saved_adapters`.
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
"""What classifiers call the layer that gives the reward; an adapter may name all of them."""


def put_on(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """`model` with a new adapter."""
    with without_warnings():
        return get_peft_model(model, config, **options)


def is_classifier(model: nn.Module) -> bool:
    return "ForSequenceClassification" in type(model).__name__


AdaptedPart = Literal["language", "language_and_projector", "everything"]
"""Which parts of a model that reads images get adapters."""


def with_adapters(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, part: AdaptedPart = "language"
) -> PreTrainedModel | PeftModel:
    """`model` with a new adapter, or as it is. A quantised base is prepared for training.

    Of a model that reads images, `part` gets adapters, unless the configuration excludes modules itself.

    A model on which `transformers` itself loaded an adapter becomes a `PeftModel`. Raises ConfigError if the model
    carries adapters already and another is asked for, or has none of the layers that the configuration names.
    """
    if isinstance(model, PreTrainedModel) and model.__dict__.get("_hf_peft_config_loaded"):
        model = as_peft_model(model)
    if peft_config is None:
        return model
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config has to be one of peft, as LoraConfig(r=16), got a {type(peft_config).__name__}."
        )
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"peft_config was given, but the model already carries the adapter(s) {sorted(model.peft_config)}. Train "
            "those (leave out peft_config or --use_peft), or merge them first: `trl merge`, or model = "
            "model.merge_and_unload()."
        )
    config = copy.copy(peft_config)
    _say_task(config, model)
    _choose_layers(config, model)
    _check_whole_layers(config, model)
    _take_packed_layers(config, model)
    _leave_out(config, part, model)
    try:
        return put_on(prepared(model), config)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise ConfigError(_no_such_layer(config, model)) from error


def _no_such_layer(config: PeftConfig, model: nn.Module) -> str:
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    there = sorted({name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, kinds)})
    asked = config.target_modules
    return (
        f"target_modules={sorted(asked) if isinstance(asked, set) else asked!r}: {type(model).__name__} has no such layer. "
        f"Its layers are {', '.join(there)}; 'all-linear' takes all but the head."
    )


def _leave_out(config: PeftConfig, part: AdaptedPart, model: PreTrainedModel) -> None:
    """Have an adapter's configuration exclude what is not in that part of a model that reads images.

    Raises ConfigError for a layer that the configuration names, and that is nowhere but there.
    """
    left_out = modules_outside(model, part)
    if left_out and not config.to_dict().get("exclude_modules"):
        _check_part(config, part, left_out, model)
        config.exclude_modules = left_out
        logger.info(
            f"Adapters: on the {part.replace('_', ' ')} of {type(model).__name__}; its image encoder stays frozen."
        )


def _check_part(config: PeftConfig, part: AdaptedPart, left_out: Collection[str], model: nn.Module) -> None:
    """Raises ConfigError for a name or pattern of layers that fits such alone as are `left_out`."""
    named = config.to_dict().get("target_modules") or ()
    patterns = [named] if isinstance(named, str) and named != "all-linear" else []
    patterns += [rf"(.*\.)?{re.escape(name)}" for name in named] if not isinstance(named, str) else []
    inside = [name for name, module in model.named_modules() if not any(module.children()) and name not in left_out]
    for pattern in patterns:
        there, here = (any(re.fullmatch(pattern, name) for name in names) for names in (left_out, inside))
        if there and not here:
            raise ConfigError(
                f"target_modules={sorted(named) if not isinstance(named, str) else named!r} names layers outside the "
                f"{part.replace('_', ' ')} of {type(model).__name__}, and adapted_part={part!r} keeps adapters off them. Set "
                "adapted_part='everything', or leave those layers out."
            )


def modules_outside(model: PreTrainedModel, part: AdaptedPart) -> list[str]:
    """Names of the modules of a model that reads images which are not in that part; none for other models."""
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
    """A quantised model as adapters train on it; others as they are."""
    if model.__dict__.get("is_loaded_in_4bit") or model.__dict__.get("is_loaded_in_8bit"):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _say_task(config: PeftConfig, model: PreTrainedModel) -> None:
    """Have an adapter's configuration name the task that the architecture says, where it names none."""
    if config.task_type is None and is_classifier(model):
        config.task_type = TaskType.SEQ_CLS
    elif config.task_type is None and model.can_generate():
        config.task_type = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def _check_whole_layers(config: PeftConfig, model: nn.Module) -> None:
    """Raises ConfigError for a layer to be trained whole that the model does not have, which peft passes over."""
    heads = HEADS if config.task_type == TaskType.SEQ_CLS else ()
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in config.to_dict().get("modules_to_save") or ():
        if name.rpartition(".")[2] not in ends and name not in heads:
            raise ConfigError(
                f"modules_to_save names {name!r}, and {type(model).__name__} has no such layer.{suggest(name, ends)}"
            )


def _choose_layers(config: PeftConfig, model: nn.Module) -> None:
    """Have LoRA take all linear layers where no layers are named and peft knows none of the architecture."""
    named = not isinstance(config, LoraConfig) or config.target_modules or config.target_parameters
    architecture = model.config.model_type
    if not named and architecture not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        config.target_modules = "all-linear"
        logger.info(f"Adapters: on all linear layers, since peft knows no usual ones of {architecture!r}.")


def _take_packed_layers(config: PeftConfig, model: nn.Module) -> None:
    """Have "all-linear" take the layers of GPTQ and AWQ, which are no `nn.Linear`."""
    packed = {name for name, module in model.named_modules() if "qweight" in dict(module.named_buffers(recurse=False))}
    if packed and vars(config).get("target_modules") == "all-linear":
        config.target_modules = packed


def as_peft_model(model: PreTrainedModel) -> PeftModel:
    """A model with an adapter inside, as `AutoModel.from_pretrained` makes it of an adapter's folder, as a `PeftModel`.

    The active adapter trains. Raises ConfigError where several adapters are on it.
    """
    if len(model.peft_config) > 1:
        raise ConfigError(
            f"This {type(model).__name__} carries the adapters {sorted(model.peft_config)} that transformers loaded: load "
            "it with peft.PeftModel.from_pretrained, and say which one trains with set_adapter."
        )
    ((name, config),) = model.peft_config.items()
    _check_magnitudes(model, config)
    # By peft itself: the method that transformers has for it asks for releases of peft that are still to come.
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
    _say_task(config, model)
    adapted = put_on(prepared(model), config, adapter_name=name)
    set_peft_model_state_dict(adapted, state, adapter_name=name)
    return adapted


def _check_magnitudes(model: nn.Module, config: PeftConfig) -> None:
    """Raises ModelError where `transformers` left the magnitudes of DoRA out, which it does in some releases.

    They are then as they are made, the norms of the base's weights, although the adapter has learned.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)] if config.to_dict().get("use_dora") else []
    for layer in layers:
        for name, magnitude in vars(layer)["_modules"].get("lora_magnitude_vector", {}).items():
            weight = layer.get_base_layer().weight
            if layer.lora_B[name].weight.any() and torch.allclose(magnitude.weight, weight.norm(dim=1)):
                raise ModelError(
                    "The adapter is one of DoRA, and transformers loaded it without its magnitudes: give its folder's name in place "
                    "of the model, or load it with peft.PeftModel.from_pretrained."
                )


def prompt_adapter(model: nn.Module) -> str | None:
    """What kind of prompt the active adapter of a model learns, as PROMPT_TUNING; None where it changes weights."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    return config.peft_type.value if config is not None and config.is_prompt_learning else None


def wrapped_layer(module: nn.Module) -> nn.Module:
    """The layer that an adapter stands in the place of; `module` itself, if it is none."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


# ---- tokens that are new ----


def new_tokens(model: PreTrainedModel, tokenizer: Any, added: Collection[int] = ()) -> list[int]:
    """Ids of tokens that the model was not trained with: `added` ones, and rows that it has not where it was loaded from."""
    first = _stored_vocabulary(model.config._name_or_path) or len(tokenizer)
    rows = len(wrapped_layer(model.get_input_embeddings()).weight)
    ids = range(first, min(len(tokenizer), rows))
    known = [i for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if FILLER not in token]
    return sorted({*added, *known})


def _stored_vocabulary(name: str) -> int | None:
    """Rows of the embeddings where a model was loaded from, a folder or the hub's cache; None for one that was not loaded."""
    if not name:
        return None
    try:
        return PreTrainedConfig.get_config_dict(name, local_files_only=True)[0].get("vocab_size")
    except OSError:  # a name that a configuration was given by hand
        return None


def with_trained_tokens(model: PeftModel, ids: Collection[int]) -> PeftModel:
    """`model` with its adapter, which is new, put on again so that the embeddings and logits of the tokens `ids` train as well.

    Without that, what a chat template brings stays as it was made, and the end of a turn is never learned. Adapters of
    a kind that cannot do it stay as they are, with a warning.
    """
    name = model.active_adapter
    config = copy.copy(model.peft_config[name])
    if not ids:
        return model
    if not isinstance(config, LoraConfig):
        logger.warning(
            f"{len(ids)} tokens are new ({list(ids)[:5]}, …), and an adapter of the kind {config.peft_type.value} does not "
            "train them: use LoRA, or a model that knows them."
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
    """By the names of the embeddings and the head: `ids`, and those that train already. None where whole tables train."""
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

    Raises ModelError for a quantised base, whose weights could not take the sum exactly, and for adapters that are no
    part of the weights (prompts).
    """
    base = model.get_base_model()
    if base.__dict__.get("is_loaded_in_4bit") or base.__dict__.get("is_loaded_in_8bit"):
        raise ModelError(
            "Merging into quantised weights loses what was learned: load the model without load_in_4bit/8bit."
        )
    kind = model.peft_config[model.active_adapter]
    if kind.is_prompt_learning:
        raise ModelError(
            f"An adapter of the kind {kind.peft_type.value} is no part of the weights: it cannot be merged."
        )
    return model.merge_and_unload(safe_merge=True)


def trains(model: nn.Module) -> bool:
    """Whether any parameter trains."""
    return any(parameter.requires_grad for parameter in model.parameters())


def thaw(model: PeftModel) -> None:
    """Let the active adapter of a model that was loaded for inference train. Raises ModelError where nothing does then."""
    adapter = model.active_adapter
    logger.warning(f"Adapter {adapter!r} was loaded frozen (is_trainable=False): it is trained here.")
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name or f".{adapter}" == name[-len(adapter) - 1 :]:
            parameter.requires_grad_(True)
    if not trains(model):
        raise ModelError(f"Nothing trains: adapter {adapter!r} ({model.peft_config[adapter].peft_type}) is frozen.")
