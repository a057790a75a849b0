"""Models and tokenizers, by name or as objects, with adapters and quantisation."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl.errors import ConfigError, ModelError, suggest
from trl.imports import require
from trl.models.sharding import loaded_whole
from trl.models.shards import check_shards

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    auto_class: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model by hub name or folder; `kwargs` go to `from_pretrained` (dtype, device_map, attn_implementation, …).

    `load_in_8bit` and `load_in_4bit` are older ways to say `quantization_config`.

    Without `auto_class`, an encoder-decoder or a causal language model, as its configuration says. Weights are
    float32 unless `dtype` says otherwise: mixed precision computes in bfloat16 where the device supports it, and
    optimizer steps are not rounded away. Code from the model's folder runs only with `trust_remote_code`.
    """
    check_shards(name)
    kwargs = {"dtype": "float32", **kwargs}
    if "torch_dtype" in kwargs:
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = _dtype(kwargs["dtype"])
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if kwargs.pop(name, False)}
    if bits:
        require("bitsandbytes", to=next(iter(bits)))
        quantization_config = BitsAndBytesConfig(**bits)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if auto_class is None:
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code, revision=kwargs.get("revision") or "main"
        )
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with loaded_whole():
        model = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    _keep_unpacked(model)
    return model


def get_kbit_device_map() -> dict[str, int] | None:
    """`device_map` of quantised weights: all on this process's accelerator; None where there is none."""
    return {"": PartialState().local_process_index} if torch.accelerator.is_available() else None


def _keep_unpacked(model: torch.nn.Module) -> None:
    """Leave 4-bit weights as they are in memory.

    On processors with AVX512-BF16, bitsandbytes packs them anew in the first forward pass that trains nothing; no gradient
    passes through weights packed so, and some shapes cannot be.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _dtype(name: str) -> torch.dtype:
    dtype = torch.__dict__.get(name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={name!r} is not a torch dtype: use 'auto', 'float32', 'bfloat16' or 'float16'.")
    return dtype


def load_processor(model: PreTrainedModel, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer or processor that belongs to a model which was loaded by name."""
    name = model.config._name_or_path
    if not name:
        raise ConfigError(
            f"processing_class is missing: this {type(model).__name__} was made from a configuration, so its tokenizer "
            "cannot be found by name. Pass processing_class=tokenizer (or tokenizer=tokenizer)."
        )
    return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor."""
    if isinstance(processing_class, str):
        raise ConfigError(f"processing_class is a tokenizer: AutoTokenizer.from_pretrained({processing_class!r}).")
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    return processing_class.tokenizer


def with_adapters(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PreTrainedModel | PeftModel:
    """`model` with a new adapter, or as it is. A quantised base is prepared for training.

    Raises ConfigError if the model carries adapters already and another is asked for.
    """
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ConfigError(
            f"peft_config was given, but the model already carries the adapter(s) {sorted(model.peft_config)}. Train "
            "those (leave out peft_config), or merge them first: model = model.merge_and_unload()."
        )
    if model.__dict__.get("is_loaded_in_4bit") or model.__dict__.get("is_loaded_in_8bit"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, _with_task(peft_config, model))


def _with_task(peft_config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """An adapter's configuration; where it names no task, with the one that the architecture says."""
    if peft_config.task_type is not None:
        return peft_config
    peft_config = copy.copy(peft_config)
    if "ForSequenceClassification" in type(model).__name__:
        peft_config.task_type = TaskType.SEQ_CLS
    elif model.can_generate():
        peft_config.task_type = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    return peft_config


def make_trainable(model: torch.nn.Module) -> None:
    """Check that something trains, and thaw the adapters of a model that was loaded for inference.

    `PeftModel.from_pretrained` loads adapters frozen: trained as they are, nothing would change.
    """
    if any(p.requires_grad for p in model.parameters()):
        return
    if not isinstance(model, PeftModel):
        raise ModelError(
            f"Nothing trains: every parameter of this {type(model).__name__} has requires_grad=False. Unfreeze some, or "
            "pass peft_config=LoraConfig(...) to train an adapter."
        )
    adapter = model.active_adapter
    logger.warning(f"Adapter {adapter!r} was loaded frozen (is_trainable=False): it is trained here.")
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name or f".{adapter}" == name[-len(adapter) - 1 :]:
            parameter.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"Nothing trains: adapter {adapter!r} ({model.peft_config[adapter].peft_type}) is frozen.")


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of `model` to zero."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)


def set_token(tokenizer: PreTrainedTokenizerBase, kind: str, token: str) -> None:
    """Make a token of the vocabulary the tokenizer's `pad_token` or `eos_token`."""
    if token not in tokenizer.get_vocab():
        raise ConfigError(
            f"{kind}={token!r} is not in the tokenizer's vocabulary.{suggest(token, tokenizer.get_vocab())}"
        )
    setattr(tokenizer, kind, token)
