"""Names that example scripts of earlier releases import."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_tokenizer
from trl import ScriptArguments, TrlParser
from trl.compat.names import CLASSIC
from trl.errors import DataError


@pytest.mark.parametrize("name", sorted(CLASSIC))
def test_every_name_is_found_by_the_old_paths_and_is_not_public(name):
    from trl.commands import cli_utils

    import trl

    assert getattr(cli_utils, name) is getattr(trl, name)
    assert name not in trl.__all__


def test_arguments_of_scripts_take_their_options():
    from trl.commands.cli_utils import DpoScriptArguments, RewardScriptArguments, SftScriptArguments

    words = ["--dataset_train_name", "a", "--packing", "--gradient_checkpointing_use_reentrant", "true"]
    (made,) = TrlParser(SftScriptArguments).parse_args_and_config(words)
    assert (made.dataset_train_name, made.dataset_train_split, made.packing, made.max_seq_length) == (
        "a",
        "a",
        True,
        512,
    )
    assert made.dataset_name == "timdettmers/openassistant-guanaco"
    assert isinstance(made, ScriptArguments)
    assert RewardScriptArguments().dataset_test_split == "test"
    assert (DpoScriptArguments().beta, DpoScriptArguments().sanity_check) == (0.1, False)


@pytest.mark.parametrize(
    ("template", "text"),
    [("SIMPLE_CHAT_TEMPLATE", "User: Hi\n\nAssistant: Yes\n\n"), ("SIMPLE_SFT_CHAT_TEMPLATE", " Hi Yes</s>")],
)
def test_chat_templates(template, text):
    from trl import classic

    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = getattr(classic, template)
    made = classic.conversations_formatting_function(tokenizer, "chat")
    assert made({"chat": chat}) == text
    assert made({"chat": [chat, chat]}) == [text, text]
    with pytest.raises(DataError, match="column 'chat' is missing or empty"):
        made({"chats": chat})


def test_a_chat_template_ends_where_the_answer_begins():
    from trl.trainer.utils import SIMPLE_CHAT_TEMPLATE

    tokenizer = make_tokenizer()
    tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE
    asked = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "User: Hi\n\nAssistant:"


def test_a_batch_for_a_classifier():
    from trl.core import build_bert_batch_from_txt

    tokenizer = make_tokenizer()
    ids, mask = build_bert_batch_from_txt(["A fox.", "No."], tokenizer, "cpu")
    assert ids.shape == mask.shape
    assert tokenizer.decode(ids[1][mask[1].bool()], skip_special_tokens=True) == "No."


def test_the_environment():
    from trl.env_utils import strtobool
    from trl.import_utils import is_npu_available, is_peft_available, is_xpu_available

    assert [strtobool(word) for word in ("1", "Yes", "off", "0")] == [True, True, False, False]
    with pytest.raises(ValueError, match="'maybe' is neither true nor false"):
        strtobool("maybe")
    assert is_peft_available()
    assert is_xpu_available() == (hasattr(torch, "xpu") and torch.xpu.is_available())
    assert is_npu_available() is False
