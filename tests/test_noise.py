"""A plain run shows no warnings of other libraries about what they do among themselves; what else they say is heard."""

from __future__ import annotations

import logging
import warnings

import pytest
import transformers
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.conftest import make_tokenizer
from trl.data.chat_formats import setup_chat_format
from trl.errors import ModelError
from trl.models.adapters import put_on
from trl.models.load import load_model
from trl.noise import LOGGED, OWN, say_once, without_noise
from trl.trainers.sft import SFTConfig, SFTTrainer


@pytest.fixture
def heard():
    """What transformers logs, as its own handler would show it."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger, ear, level = logging.getLogger("transformers"), Ear(), transformers.logging.get_verbosity()
    logger.addHandler(ear)
    transformers.logging.set_verbosity_warning()
    yield said
    transformers.logging.set_verbosity(level)
    logger.removeHandler(ear)


def test_a_new_head_new_tokens_and_an_aligned_padding_token_are_no_news(make_model, tmp_path, heard):
    model, tokenizer = make_model("llama", pad_token_id=None), make_tokenizer()
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path), auto_class=AutoModelForSequenceClassification, num_labels=1)
    args = SFTConfig(
        str(tmp_path / "run"), max_steps=1, save_strategy="no", report_to=[], html_report=False, disable_tqdm=True
    )
    rows = Dataset.from_dict({"text": ["A fox runs."]})
    SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<new>"])
    setup_chat_format(model, tokenizer)
    assert heard == []


def test_weights_that_are_missing_beside_a_head_are_heard(make_model, tmp_path, heard):
    make_model("llama").save_pretrained(tmp_path)
    before = [list(logging.getLogger(name).filters) for name in LOGGED]
    with without_noise():
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, num_hidden_layers=3)
    assert "layers.2" in "".join(heard).replace("{", "").replace("}", "")
    assert [logging.getLogger(name).filters for name in LOGGED] == before


def test_a_report_is_heard_where_no_error_says_it(make_model, tmp_path, heard):
    make_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "model.other": weights["lm_head.weight"].clone()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    load_model(str(tmp_path))
    assert "LOAD REPORT" in "".join(heard)
    heard.clear()
    save_file(
        {**weights, "score.weight": weights["lm_head.weight"].clone()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"score\.weight"):
        load_model(str(tmp_path))
    assert heard == []


def test_an_adapter_is_no_news(make_model):
    model = make_model("llama")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        put_on(model, LoraConfig(target_modules=["q_proj"]))
    assert said == []


@pytest.fixture
def plain_levels():
    """Loggers of the package without levels, as they are before anything was made."""
    before = {name: logging.getLogger(name).level for name in ("trl", *OWN)}
    for name in before:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(("rank", "heard"), [("0", True), ("1", False)])
def test_what_all_processes_would_say_is_said_by_the_first(monkeypatch, plain_levels, rank, heard):
    monkeypatch.setenv("LOCAL_RANK", rank)
    say_once()
    assert logging.getLogger("trl.data.encode").isEnabledFor(logging.WARNING) is heard
    assert logging.getLogger("trl.data.encode").isEnabledFor(logging.ERROR)
    assert logging.getLogger("trl.rewards.call").isEnabledFor(logging.WARNING)
