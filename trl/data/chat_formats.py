"""Give a model a chat template and the tokens that it needs: that of another tokenizer, or ChatML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl.errors import ConfigError, DataError, unknown
from trl.noise import without_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILLER = "<filler_"
"""Prefix of the filler tokens for embedding rows beyond the vocabulary, which rounding up to a multiple adds."""


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str | PreTrainedTokenizerBase,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Give a model the chat template of another tokenizer, with the tokens that it needs and its EOS token.

    The embeddings are resized for the new tokens, to a multiple of `resize_to_multiple_of` (None: no rounding); filler tokens
    are added to the tokenizer for the surplus rows.

    Returns the model and tokenizer, changed in place, and the ids of the tokens that were added (train their
    embeddings: `LoraConfig(trainable_token_indices=…)`).
    """
    source = source_tokenizer_path
    if isinstance(source, str):
        source = AutoTokenizer.from_pretrained(source)
    if not source.chat_template:
        raise DataError(f"The tokenizer {source.name_or_path!r} has no chat template to clone. Choose a chat model's.")
    tokenizer.chat_template = source.chat_template
    known = tokenizer.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    tokenizer.add_tokens(new)
    tokenizer.eos_token = source.eos_token
    before = model.get_input_embeddings().num_embeddings
    _fit_embeddings(model, tokenizer, resize_to_multiple_of)
    rows = model.get_input_embeddings().num_embeddings
    if rows > before:  # so that every id that the model can sample is a token
        tokenizer.add_tokens([f"{FILLER}{i}>" for i in range(rows - len(tokenizer))])
    return model, tokenizer, tokenizer.convert_tokens_to_ids([token.content for token in new])


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def setup_chat_format(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    format: Literal["chatml"] = "chatml",
    resize_to_multiple_of: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Give a base model the ChatML format with its two tokens; `<|im_end|>` becomes the EOS and padding token.

    Model and tokenizer are changed in place. Raises DataError if the tokenizer already has a chat template.
    """
    if tokenizer.chat_template is not None:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path!r} has a chat template already. Train with that, or set "
            "tokenizer.chat_template = None first."
        )
    if format != "chatml":
        raise ConfigError(unknown("format", format, ["chatml"]))
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer.add_special_tokens(ends)
    tokenizer.chat_template = CHATML
    _fit_embeddings(model, tokenizer, resize_to_multiple_of)
    for config in filter(None, (model.config, model.generation_config)):
        config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    return model, tokenizer


def _fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, multiple_of: int | None) -> None:
    """Resize the embeddings to have a row for every token, and set the model's EOS to that of the tokenizer."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with without_noise("transformers.modeling_utils"):
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple_of)
    for config in filter(None, (model.config, vars(model).get("generation_config"))):  # classifiers have none
        config.eos_token_id = tokenizer.eos_token_id
