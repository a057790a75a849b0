"""Load models, tokenizers and processors by name or folder, with adapters and quantisation."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from trl.errors import ConfigError, ModelError, ModelNotFoundError, TrlError, listed, suggest
from trl.imports import require
from trl.models.adapters import HEADS, thaw, trains
from trl.models.attention_packages import check_attention
from trl.models.files import check_shards
from trl.models.not_found import explain_missing
from trl.models.saved_adapters import OF_ONE_MODEL, base_of, hub_options, is_adapter, with_adapter_of
from trl.models.sharding import loaded_whole
from trl.noise import unless_said, without_noise

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer_config.json"
PROCESSOR = "processor_config.json"

SHOWN = 3
"""Number of layers that an error names."""

DTYPE = "float32"
"""Precision of weights that are loaded without `dtype`."""

_KEYWORDS = """
    dtype attn_implementation device_map max_memory offload_folder quantization_config load_in_4bit load_in_8bit revision
    subfolder variant token cache_dir local_files_only force_download use_safetensors weights_only key_mapping use_kernels
    adapter
"""
KEYWORDS = tuple(_KEYWORDS.split())
"""Keyword arguments of `from_pretrained`, for suggestions: it takes more, and its signature names few of them."""

UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")

NUMBERED = re.compile(r"(?:layers?|h|blocks?)\.(\d+)\.")
"""Matches the number of the layer in a parameter's name."""


def load_model(
    name: str,
    *,
    auto_class: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    trainable: bool = True,
    subject: str = "",
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Load a model by hub name or folder; `kwargs` go to `from_pretrained` (dtype, device_map, attn_implementation, …).

    If `name` is an adapter, its base model is loaded as well; or `adapter` names one to add to the model. `trainable` says
    whether the adapter can be trained further. `load_in_8bit` and `load_in_4bit` are shorthands for `quantization_config`.

    Without `auto_class`, the configuration decides between encoder-decoder, vision-language and causal language model.
    Weights are float32 unless `dtype` is given: mixed precision then computes in bfloat16 where the device supports it,
    and small optimizer steps are not lost in rounding. Code from the model's folder runs only with `trust_remote_code`.

    Raises ModelNotFoundError if there is no such model; its message begins with `subject`.
    """
    check_attention(kwargs.get("attn_implementation"))
    hub = hub_options(kwargs)
    if adapter is None and _names_adapter(name, subject, hub):
        name, adapter = base_of(name, **hub), name
        subject = f"{name!r}, the base model of the adapter {adapter!r},"
        kwargs = {key: value for key, value in kwargs.items() if key not in OF_ONE_MODEL}
    elif adapter is not None:
        hub = hub_options(kwargs, of_another=True)
    with explain_missing(name, subject, kwargs.get("subfolder")):
        kwargs |= {"trust_remote_code": trust_remote_code, "subject": subject}
        model = _load_whole(name, auto_class, quantization_config, has_adapter=adapter is not None, **kwargs)
    return model if adapter is None else with_adapter_of(model, adapter, trainable=trainable, **hub)


@contextmanager
def naming_keywords(option: str, given: Mapping[str, Any], name: str) -> Iterator[None]:
    """Turn the error of `from_pretrained` about an unknown keyword argument, given in `option`, into a ConfigError."""
    try:
        yield
    except TypeError as error:
        found = UNEXPECTED.search(str(error))
        if found is None or found[1] not in given:
            raise
        config = load_config(name, trust_remote_code=given.get("trust_remote_code", False), **hub_options(given))
        raise ConfigError(
            f"{option}: neither from_pretrained nor the configuration of {name!r} has {found[1]!r}."
            f"{suggest(found[1], [*KEYWORDS, *config.to_dict()])}"
        ) from error


def _load_whole(
    name: str,
    auto_class: Any,
    quantization_config: Any,
    *,
    has_adapter: bool,
    trust_remote_code: bool,
    subject: str,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model without adapters. With `has_adapter`, missing layers are no error, as the adapter may contain them."""
    check_shards(name)
    kwargs = _with_precision(kwargs, quantization_config)
    if auto_class in (None, AutoModelForCausalLM):
        config = load_config(name, trust_remote_code=trust_remote_code, subject=subject, **hub_options(kwargs))
        found = language_model_class(config)
        auto_class = found if auto_class is None or found is AutoModelForImageTextToText else auto_class
    loading = {**kwargs, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    reporting = "transformers.modeling_utils"
    with without_noise(reporting), unless_said(reporting, "LOAD REPORT", ModelError):
        with loaded_whole():
            model, found = auto_class.from_pretrained(name, **loading)
        # An adapter may contain missing layers, and quantised layers have other names.
        if "quantization_config" not in kwargs and not has_adapter:
            check_layers(model, name, **found)
    keep_unpacked(model)
    mend_generation_config(model)
    return model


def _with_precision(options: Mapping[str, Any], quantization_config: Any) -> dict[str, Any]:
    """The options of `from_pretrained` with `dtype` (default: float32) and `quantization_config` in the present spelling."""
    options = {"dtype": DTYPE, **options}
    options["dtype"] = options.pop("torch_dtype", options["dtype"])
    if options["dtype"] not in (None, "auto") and not isinstance(options["dtype"], torch.dtype | Mapping):
        options["dtype"] = _dtype(options["dtype"])
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if options.pop(name, False)}
    if bits:
        require("bitsandbytes", to=next(iter(bits)))
        quantization_config = BitsAndBytesConfig(**bits)
    return options if quantization_config is None else {**options, "quantization_config": quantization_config}


def check_layers(
    model: PreTrainedModel, name: str, *, missing_keys: Collection[str], unexpected_keys: Collection[str], **_: Any
) -> None:
    """Raises ModelError if the saved weights of a model do not match its configuration.

    Missing layers would be initialised randomly, and unexpected ones would be dropped. A classifier may have a new head.
    """
    is_classifier = type(model).__name__.endswith("Classification")
    missing = [key for key in missing_keys if not is_classifier or NUMBERED.search(key)]
    heads = [key for key in unexpected_keys if key.partition(".")[0] in HEADS]
    if heads and not is_classifier:
        raise ModelError(
            f"{name!r} holds a reward model or classifier ({heads[0]}), but is loaded as {type(model).__name__}: it gives scores "
            "and cannot generate text. Name a language model; reward models are given as reward_funcs (--reward_funcs)."
        )
    if missing:
        raise ModelError(
            f"The weights of {name!r} lack {len(missing)} parameters of {type(model).__name__} "
            f"({listed(sorted(missing), SHOWN)}), which would be initialised randomly. The weights do not match "
            "config.json, or were saved without a head: name another model."
        )
    text = model.config.get_text_config()
    known = None if vars(text).get("num_nextn_predict_layers") else vars(text).get("num_hidden_layers")
    extra = [key for key in unexpected_keys if (found := NUMBERED.search(key)) and known and int(found[1]) >= known]
    if extra:
        raise ModelError(
            f"The weights of {name!r} hold layers that its config.json does not have (num_hidden_layers={known}): "
            f"{listed(sorted(extra), SHOWN)}. They would be dropped: correct config.json, or name another model."
        )


def mend_generation_config(model: torch.nn.Module) -> None:
    """Correct a generation config that `transformers` would refuse to save, which would fail at the first checkpoint.

    Some published models set temperature or top_p without do_sample: it is set to True, with a warning. Raises ModelError
    for a generation config that is invalid in another way.
    """
    config = model.__dict__.get("generation_config")
    if config is None or not (problem := _why_not_saved(config)):
        return
    was, config.do_sample = config.do_sample, True
    if remaining := _why_not_saved(config):
        config.do_sample = was
        raise ModelError(
            f"The generation config of {model.config._name_or_path or type(model).__name__!r} cannot be saved, so no checkpoint "
            f"could be written: {remaining} Change model.generation_config, or generation_config.json in its folder."
        )
    logger.warning(
        f"Setting generation_config.do_sample=True, since the generation config cannot be saved without: {problem}"
    )


def _why_not_saved(config: GenerationConfig) -> str:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def language_model_class(config: PreTrainedConfig) -> Any:
    """The Auto class for this configuration: that of encoder-decoders, of vision-language or of causal language models."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def load_config(name: str, *, trust_remote_code: bool = False, subject: str = "", **hub: Any) -> PreTrainedConfig:
    """Load the configuration of a model by hub name or folder; for an adapter, that of its base model.

    `hub` are options of `HUB_OPTIONS`.
    """
    if _names_adapter(name, subject, hub):
        name, hub, subject = base_of(name, **hub), hub_options(hub, of_another=True), ""
    with explain_missing(name, subject):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)


def _names_adapter(name: str, subject: str, hub: Mapping[str, Any]) -> bool:
    with explain_missing(name, subject):
        return is_adapter(name, **hub)


def get_kbit_device_map() -> dict[str, int] | None:
    """`device_map` for quantised weights: everything on this process's accelerator; None without an accelerator."""
    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


def keep_unpacked(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    On CPUs with AVX512-BF16 it repacks them in the first forward pass in evaluation mode. No gradient flows through repacked
    weights, and some shapes cannot be repacked.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def keep_own_loss(model: torch.nn.Module) -> None:
    """Disable the SFT loss that unsloth adds to models on a CPU: it needs rows as dicts of tensors, and trainers have
    their own."""
    for module in model.modules():
        if "_unsloth_cpu_chunked_ce" in vars(module):
            module._unsloth_cpu_chunked_ce = False


def warn_of_own_loss(model: torch.nn.Module) -> None:
    """Warn of a model whose forward or `loss_function` is of a script: a loss that it computes is not used."""
    own = {"forward": type(model).forward, "loss_function": vars(model).get("_loss_function")}
    for name, function in own.items():
        if function is not None and _is_outside_packages(function):
            logger.warning(
                f"{type(model).__name__}.{name} is of your own: a loss that it computes is not used, since trainers compute it from the "
                "model's logits. For another loss override `loss(model, batch)` of the trainer."
            )


def _is_outside_packages(function: Callable) -> bool:
    """Whether a function is neither of a package nor of code that came with a model, or that unsloth writes for it."""
    package, _, _ = function.__module__.partition(".")
    file = getattr(sys.modules.get(function.__module__), "__file__", None) or ""
    is_known = package.startswith(("transformers", "trl", "peft", "unsloth"))
    return not is_known and not {"site-packages", "dist-packages"} & {*Path(file).parts}


def _dtype(name: Any) -> torch.dtype:
    dtype = torch.__dict__.get(str(name).removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={name!r} is not a torch dtype: use 'auto', 'float32', 'bfloat16' or 'float16'.")
    return dtype


def load_processor(
    model: PreTrainedModel,
    name: str | None = None,
    *,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    **hub: Any,
) -> Any:
    """Load the tokenizer or processor of a model that was loaded by `name`, with `adapter` and the options `hub` of `HUB_OPTIONS`.

    It is the one saved with the adapter if there is one, else the one in the model's subfolder or above it, else that of the
    base model of the adapter `name`.
    """
    base, others = model.config._name_or_path, hub_options(hub, of_another=True)
    above = {option: value for option, value in hub.items() if option != "subfolder"}
    places = [(adapter, others), (name, hub), (name, above)]
    saved = (place for place in places if place[0] is not None and has_file(place[0], TOKENIZER, **place[1]))
    name, hub = next(saved, (base, hub if name == base else others))
    if not name:
        raise ConfigError(
            f"processing_class is missing: this {type(model).__name__} was created from a configuration and has no name by which "
            "to find its tokenizer. Pass processing_class=tokenizer (or tokenizer=tokenizer)."
        )
    auto = AutoProcessor if name == base or has_file(name, PROCESSOR, **hub) else AutoTokenizer
    with explain_missing_tokenizer(name):
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)


def processor_source(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `load_processor` for a model that was loaded by name with the keyword arguments `options`; empty for an object."""
    named = {"name": model, **hub_options(options)} if isinstance(model, str) else {}
    return named if options.get("adapter") is None else {**named, "adapter": options["adapter"]}


@contextmanager
def explain_missing_tokenizer(name: str) -> Iterator[None]:
    """As `explain_missing`; raises ModelNotFoundError also for a model's folder without a tokenizer."""
    try:
        with explain_missing(name):
            yield
    except (OSError, ValueError) as error:
        if isinstance(error, TrlError) or not Path(name).is_dir() or Path(name, TOKENIZER).exists():
            raise
        raise ModelNotFoundError(
            f"{name!r} holds no tokenizer ({TOKENIZER} is missing): save one there (tokenizer.save_pretrained), or "
            "pass processing_class=tokenizer in Python."
        ) from error


def has_file(name: str, file: str, **hub: Any) -> bool:
    """Whether a folder or hub repository has a file."""
    return find_file(name, file, **hub) is not None


def find_file(name: str, file: str, **hub: Any) -> Path | None:
    """Path of a file in a folder or hub repository; None if it does not exist or the hub cannot be reached."""
    kinds = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(name, file, **{f"_raise_exceptions_for_{kind}": False for kind in kinds}, **hub)
    return None if found is None else Path(found)


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    if isinstance(processing_class, str):
        raise ConfigError(
            f"processing_class={processing_class!r} is a name: pass the tokenizer itself, "
            f"AutoTokenizer.from_pretrained({processing_class!r})."
        )
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    return processing_class.tokenizer


def make_trainable(model: torch.nn.Module) -> None:
    """Check that some parameter is trainable; unfreeze the adapter of a model that was loaded for inference.

    `PeftModel.from_pretrained` loads adapters frozen by default, so that training would change nothing.
    """
    if trains(model):
        return
    if not isinstance(model, PeftModel):
        raise ModelError(
            f"Nothing trains: every parameter of this {type(model).__name__} has requires_grad=False. Unfreeze some, or "
            "pass peft_config=LoraConfig(...) to train an adapter."
        )
    thaw(model)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Number of trainable parameters, and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, is_trained in sizes if is_trained), sum(n for n, _ in sizes)


DROPOUT = re.compile(r"(dropout|pdrop|layerdrop)(_p|_prob|_rate)?$")
"""Names of module attributes that are dropout probabilities."""

SCALES = ("moe_token_dropout",)
"""Probabilities that also scale activations in evaluation mode, so that they are part of the model."""


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of `model` to zero."""
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether a dropout probability of `model` is above zero."""
    return any(getattr(module, name) > 0 for module, name in _dropouts(model))


def _dropouts(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Modules, and the names of their dropout probabilities."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            yield module, "p"
        for name, value in [*vars(module).items()]:
            if isinstance(value, float) and DROPOUT.search(name) and name not in SCALES:
                yield module, name


def set_token(tokenizer: PreTrainedTokenizerBase, kind: str, token: str) -> None:
    """Set the tokenizer's `pad_token` or `eos_token` to a token of its vocabulary. Raises ConfigError for another."""
    if token not in tokenizer.get_vocab():
        raise ConfigError(
            f"{kind}={token!r} is not in the tokenizer's vocabulary.{suggest(token, tokenizer.get_vocab())}"
        )
    setattr(tokenizer, kind, token)
