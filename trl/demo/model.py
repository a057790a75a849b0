"""A tokenizer trained on the reviews, and a GPT-2 small enough to learn them on two CPU cores within a minute."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 2560) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the texts: encoding is lossless for any string.

    With the default vocabulary size, almost every word of the reviews is one token. Padding and end of sequence are
    different tokens. Encoding does not append the end-of-sequence token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, width: int = 192, depth: int = 2) -> GPT2LMHeadModel:
    """A GPT-2 with random weights and no dropout; 1.4 million parameters at the default size.

    `width` is the hidden size, a multiple of 32 (the size of an attention head); `depth` counts layers.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=tokenizer.model_max_length,
        n_embd=width,
        n_layer=depth,
        n_head=width // 32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)
