"""Models and tokenizers, by name or as objects, with adapters and quantisation."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
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

from trl.errors import ConfigError, ModelError, ModelNotFoundError, TrlError, suggest
from trl.imports import require
from trl.models.adapters import HEADS, thaw, trains
from trl.models.attention_packages import check_attention
from trl.models.names import explain_missing
from trl.models.saved_adapters import HUB_OPTIONS, base_of, is_adapter, with_adapter_of
from trl.models.sharding import loaded_whole
from trl.models.shards import check_shards
from trl.noise import unless_said, without_noise

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer_config.json"
PROCESSOR = "processor_config.json"

NUMBERED = re.compile(r"(?:layers?|h|blocks?)\.(\d+)\.")
"""A parameter of a numbered layer."""


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
    """A model by hub name or folder; `kwargs` go to `from_pretrained` (dtype, device_map, attn_implementation, …).

    The name may be that of an adapter, which brings its base model along, or `adapter` names one to put on the model;
    `trainable` says whether it trains on. `load_in_8bit` and `load_in_4bit` are older ways to say `quantization_config`.

    Without `auto_class`, an encoder-decoder, a model that reads images or a causal language model, as its configuration
    says. Weights are float32 unless `dtype` says otherwise: mixed precision computes in bfloat16 where the device supports
    it, and optimizer steps are not rounded away. Code from the model's folder runs only with `trust_remote_code`.

    Raises ModelNotFoundError where the name stands for nothing; `subject` is what its message begins with.
    """
    check_attention(kwargs.get("attn_implementation"))
    hub = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
    if adapter is None and _names_adapter(name, subject, hub):
        name, adapter = base_of(name, **hub), name
        subject = f"{name!r}, the model of the adapter {adapter!r},"
        kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
    elif adapter is not None:
        hub = {}
    with explain_missing(name, subject, kwargs.get("subfolder")):
        kwargs |= {"trust_remote_code": trust_remote_code, "subject": subject}
        model = _load_whole(name, auto_class, quantization_config, has_adapter=adapter is not None, **kwargs)
    return model if adapter is None else with_adapter_of(model, adapter, trainable=trainable, **hub)


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
    """A model without an adapter; what it lacks is no error where an adapter is to bring it."""
    check_shards(name)
    kwargs = _with_precision(kwargs, quantization_config)
    if auto_class in (None, AutoModelForCausalLM):
        options = {"trust_remote_code": trust_remote_code, "revision": kwargs.get("revision"), "subject": subject}
        config = load_config(name, **options)
        found = language_model_class(config)
        auto_class = found if auto_class is None or found is AutoModelForImageTextToText else auto_class
    loading = {**kwargs, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    reporting = "transformers.modeling_utils"
    with without_noise(reporting), unless_said(reporting, "LOAD REPORT", ModelError):
        with loaded_whole():
            model, found = auto_class.from_pretrained(name, **loading)
        # An adapter may bring layers; quantised ones have other names.
        if "quantization_config" not in kwargs and not has_adapter:
            check_layers(model, name, **found)
    keep_unpacked(model)
    mend_generation_config(model)
    return model


def _with_precision(options: Mapping[str, Any], quantization_config: Any) -> dict[str, Any]:
    """The options of `from_pretrained` with the type of the weights, and how they are quantised, as `transformers` says it."""
    options = {"dtype": "float32", **options}
    options["dtype"] = options.pop("torch_dtype", options["dtype"])
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = _dtype(options["dtype"])
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if options.pop(name, False)}
    if bits:
        require("bitsandbytes", to=next(iter(bits)))
        quantization_config = BitsAndBytesConfig(**bits)
    return options if quantization_config is None else {**options, "quantization_config": quantization_config}


def check_layers(
    model: PreTrainedModel, name: str, *, missing_keys: Collection[str], unexpected_keys: Collection[str], **_: Any
) -> None:
    """Raises ModelError where weights and configuration of a model do not belong together.

    Layers that the weights lack would be random, and those that are left over would be dropped. The head of a classifier
    may be new.
    """
    is_classifier = type(model).__name__.endswith("Classification")
    missing = [key for key in missing_keys if not is_classifier or NUMBERED.search(key)]
    heads = [key for key in unexpected_keys if key.partition(".")[0] in HEADS]
    if heads and not is_classifier:
        raise ModelError(
            f"{name!r} holds a reward model or classifier ({heads[0]}), and is loaded as {type(model).__name__}: it gives scores, "
            "and writes no text. Name a language model; a reward model goes to reward_funcs (--reward_funcs)."
        )
    if missing:
        raise ModelError(
            f"The weights of {name!r} lack {len(missing)} parameters of {type(model).__name__} ({_some(missing)}), which would be "
            "random. They do not belong to this config.json, or were saved without a head: name another model."
        )
    text = model.config.get_text_config()
    known = None if vars(text).get("num_nextn_predict_layers") else vars(text).get("num_hidden_layers")
    extra = [key for key in unexpected_keys if (found := NUMBERED.search(key)) and known and int(found[1]) >= known]
    if extra:
        raise ModelError(
            f"The weights of {name!r} hold layers that its config.json does not have (num_hidden_layers={known}): "
            f"{_some(extra)}. They would be dropped: mend the configuration, or name another model."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def mend_generation_config(model: torch.nn.Module) -> None:
    """Make a generation config valid that `transformers` would refuse to save, at the first checkpoint of a run.

    Some published ones give a temperature or top_p and do not say that they sample: they do so now, with a warning. Raises
    ModelError for one that is invalid in another way.
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
    logger.warning(f"generation_config: do_sample=True from now on, since it could not be saved as it was: {problem}")


def _why_not_saved(config: GenerationConfig) -> str:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def language_model_class(config: PreTrainedConfig) -> Any:
    """The Auto class of a language model: of an encoder-decoder, one that reads images, or a causal one."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def load_config(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, subject: str = ""
) -> PreTrainedConfig:
    """The configuration of a model by hub name or folder; of an adapter's, that of its base model."""
    hub = {} if revision is None else {"revision": revision}
    if _names_adapter(name, subject, hub):
        name, hub, subject = base_of(name, **hub), {}, ""
    with explain_missing(name, subject):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)


def _names_adapter(name: str, subject: str, hub: Mapping[str, Any]) -> bool:
    with explain_missing(name, subject):
        return is_adapter(name, **hub)


def get_kbit_device_map() -> dict[str, int] | None:
    """`device_map` of quantised weights: all on this process's accelerator; None where there is none."""
    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


def keep_unpacked(model: torch.nn.Module) -> None:
    """Leave 4-bit weights as they are in memory.

    On processors with AVX512-BF16, bitsandbytes packs them anew in the first forward pass that trains nothing; no gradient
    passes through weights packed so, and some shapes cannot be.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def keep_own_loss(model: torch.nn.Module) -> None:
    """Let trainers compute the loss of a model that unsloth loaded on a CPU: its own SFT loss asks for rows as dicts of tensors."""
    for module in model.modules():
        if "_unsloth_cpu_chunked_ce" in vars(module):
            module._unsloth_cpu_chunked_ce = False


def _dtype(name: str) -> torch.dtype:
    dtype = torch.__dict__.get(name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={name!r} is not a torch dtype: use 'auto', 'float32', 'bfloat16' or 'float16'.")
    return dtype


def load_processor(
    model: PreTrainedModel, name: str | None = None, *, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The tokenizer or processor of a model that was loaded by `name`: that of an adapter's folder, if it holds one."""
    hub = {} if revision is None else {"revision": revision}
    base = model.config._name_or_path
    if name is None or not has_file(name, TOKENIZER, **hub):
        name, hub = base, hub if name == base else {}
    if not name:
        raise ConfigError(
            f"processing_class is missing: this {type(model).__name__} was made from a configuration, so its tokenizer "
            "cannot be found by name. Pass processing_class=tokenizer (or tokenizer=tokenizer)."
        )
    auto = AutoProcessor if name == base or has_file(name, PROCESSOR, **hub) else AutoTokenizer
    with explain_missing_tokenizer(name):
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)


@contextmanager
def explain_missing_tokenizer(name: str) -> Iterator[None]:
    """`explain_missing`, and a ModelNotFoundError for the folder of a model without a tokenizer."""
    try:
        with explain_missing(name):
            yield
    except (OSError, ValueError) as error:
        if isinstance(error, TrlError) or not Path(name).is_dir() or Path(name, TOKENIZER).exists():
            raise
        raise ModelNotFoundError(
            f"{name!r} holds no tokenizer ({TOKENIZER} is missing): save one there (tokenizer.save_pretrained), or give "
            "processing_class=tokenizer."
        ) from error


def has_file(name: str, file: str, **hub: Any) -> bool:
    """Whether a folder, or a repository of the hub, holds a file."""
    return find_file(name, file, **hub) is not None


def find_file(name: str, file: str, **hub: Any) -> Path | None:
    """A file of a folder, or of a repository of the hub; None where it is not there, or the hub cannot be reached."""
    kinds = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(name, file, **{f"_raise_exceptions_for_{kind}": False for kind in kinds}, **hub)
    return None if found is None else Path(found)


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    if isinstance(processing_class, str):
        raise ConfigError(f"processing_class is a tokenizer: AutoTokenizer.from_pretrained({processing_class!r}).")
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    return processing_class.tokenizer


def make_trainable(model: torch.nn.Module) -> None:
    """Check that something trains, and thaw the adapters of a model that was loaded for inference.

    `PeftModel.from_pretrained` loads adapters frozen: trained as they are, nothing would change.
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
    """(trained, all) numbers of parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, is_trained in sizes if is_trained), sum(n for n, _ in sizes)


DROPOUT = re.compile(r"(dropout|pdrop|layerdrop)(_p|_prob|_rate)?$")
"""Names under which modules hold a probability of dropping something."""

SCALES = ("moe_token_dropout",)
"""Probabilities that also scale what is computed in evaluation, so that they are part of the model."""


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
    """Make a token of the vocabulary the tokenizer's `pad_token` or `eos_token`."""
    if token not in tokenizer.get_vocab():
        raise ConfigError(
            f"{kind}={token!r} is not in the tokenizer's vocabulary.{suggest(token, tokenizer.get_vocab())}"
        )
    setattr(tokenizer, kind, token)
