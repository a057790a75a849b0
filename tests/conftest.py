"""Tiny models made from configurations, shared by the tests."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import random
import signal
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which models of transformers do

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.forked import begin_session

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # sums are rounded by how many threads share them, and workers of pytest share the cores
gc.freeze()  # for programs that import this: see `pytest_collection_finish`
atexit.register(gc.unfreeze)  # extension modules say on the way out what was not collected

VOCABULARY = 99
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SPECIAL,
}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    **SPECIAL,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
OPT = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
}

MODELS = {
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**{**WIDTHS, **kw})),
    "gpt2": lambda **kw: GPT2LMHeadModel(GPT2Config(**{**GPT2, **kw})),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**{**WIDTHS, "head_dim": 8, **kw})),
    "gemma2": lambda **kw: Gemma2ForCausalLM(Gemma2Config(**{**WIDTHS, "head_dim": 8, "sliding_window": 8, **kw})),
    "gemma3": lambda **kw: Gemma3ForCausalLM(Gemma3TextConfig(**{**WIDTHS, "head_dim": 8, "sliding_window": 8, **kw})),
    "cohere": lambda **kw: CohereForCausalLM(CohereConfig(**{**WIDTHS, "logit_scale": 0.25, **kw})),
    "granite": lambda **kw: GraniteForCausalLM(GraniteConfig(**{**WIDTHS, "logits_scaling": 4.0, **kw})),
    "bloom": lambda **kw: BloomForCausalLM(BloomConfig(**{**BLOOM, **kw})),
    "mamba": lambda **kw: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, **SPECIAL, **kw)
    ),
    "opt": lambda **kw: OPTForCausalLM(OPTConfig(**{**OPT, **kw})),
    "t5": lambda **kw: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0, dropout_rate=0.0, **kw)),
    "bart": lambda **kw: BartForConditionalGeneration(BartConfig(**BART, dropout=0.0, **kw)),
}


@pytest.fixture
def make_model():
    """`make_model("llama", seed=0, **config)`: a tiny random model of that architecture, in eval mode."""

    def make(name: str, seed: int = 0, **config):
        torch.manual_seed(seed)
        model = MODELS[name](**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        return model

    return make


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 99 tokens without merges to speak of, with special tokens and a ChatML template."""
    return make_tokenizer()


def make_tokenizer(**kwargs):
    alphabet = sorted("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?'\n-")
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **kwargs,
    )
    made.chat_template = CHATML
    return made


@pytest.fixture(autouse=True, scope="module")
def imports_stay() -> None:
    """As `pytest_collection_finish` does, for what the tests of other files imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What is random is so in the same way, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def products_of_float32() -> None:
    """A GPU computes in float32 where that is asked for: not in TF32, by default or by an option of an earlier test."""
    if torch.cuda.is_available():
        with warnings.catch_warnings(action="ignore"):  # some releases of torch have newer names for these
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def logger_as_imported() -> None:
    """The command line shows what the library logs in a way of its own; here it is as if no command had run before."""
    logger = logging.getLogger("trl")
    logger.handlers, logger.propagate, logger.disabled = [], True, False
    logger.setLevel(logging.NOTSET)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pretend-cuda", action="store_true", help="run tests on a CUDA device that is not there")


@pytest.fixture(autouse=True)
def on_pretended_cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--pretend-cuda`, every test runs on the device of `tests/pretended_cuda.py`."""
    if not request.config.getoption("--pretend-cuda"):
        yield
        return
    from tests.pretended_cuda import pretended_cuda

    with pretended_cuda():
        yield


def pytest_configure() -> None:
    """Programs of tests share a server. A shell starts what runs in the background deaf to Ctrl-C, and tests press it."""
    begin_session()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays. Every training run collects garbage, and looking through all that takes longer than the run."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that no process is left alone with one at the end; long runs only where they are asked for."""
    if not os.environ.get("TRL_TEST_LONG"):
        left_out = pytest.mark.skip(reason="TRL_TEST_LONG=1 runs it")
        for item in items:
            if item.get_closest_marker("long"):  # `keywords` holds the names of parameters, too
                item.add_marker(left_out)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
