"""Prepares the tokenizer or processor of a trainer, and sets its special tokens and chat template by the options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trl.data.chat_formats import clone_chat_template
from trl.errors import ConfigError
from trl.models.load import load_processor, set_token, tokenizer_of
from trl.trainers.config import TEMPLATES, TrainerConfig


def processor_for(
    args: TrainerConfig, model: PreTrainedModel, processing_class: Any, tokenizer: Any, source: Mapping[str, Any]
) -> Any:
    """The given processor (`tokenizer` is the older name of the argument), or else the one loaded from `source`.

    Sets the special tokens of the options `pad_token` and `eos_token`.
    """
    if processing_class is not None and tokenizer is not None:
        raise ConfigError("processing_class and tokenizer are two names of one argument: give one of them.")
    processor = processing_class if processing_class is not None else tokenizer
    if processor is None:
        processor = load_processor(model, **source, trust_remote_code=args.trust_remote_code)
    for token in ("pad_token", "eos_token"):
        if (value := getattr(args, token)) is not None:
            set_token(tokenizer_of(processor), token, value)
    return processor


def take_chat_template(args: TrainerConfig, model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Set the chat template of `chat_template_path` on the tokenizer. Returns the ids of tokens that it added."""
    path = args.chat_template_path
    if path is None:
        return []
    if path.endswith(TEMPLATES):
        tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
        return []
    try:
        return clone_chat_template(model, tokenizer, path)[2]
    except OSError as error:
        raise ConfigError(
            f"chat_template_path={path!r} is no .jinja file, and no tokenizer was found there: {error}"
        ) from error
