"""The classic scripts run from end to end, with tiny models under the names that they are given."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.conftest import MODELS, make_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = {
    "reviews": [{"text": "The film was a joy from start to finish."}] * 8,
    "comments": [{"prompt": "You are such a "}] * 8,
    "pairs": [{"prompt": "Far? ", "chosen": "Two hours.", "rejected": "Yes."}] * 8,
    "questions-and-answers": [{"question": "Far?", "response_j": "Two hours.", "response_k": "Yes."}] * 8,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A folder with tiny models and datasets."""
    folder = tmp_path_factory.mktemp("names")
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "hate", 1: "POSITIVE"}
    classifier = BertForSequenceClassification(BertConfig(vocab_size=99, pad_token_id=0, id2label=labels, **widths))
    for name, model in (("gpt2", MODELS["gpt2"]()), ("llama", MODELS["llama"]()), ("classifier", classifier)):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(names, tmp_path, monkeypatch):
    """`run("file.py", "--option", …)`: the script, in a folder where the names are."""
    for folder in names.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})

    def script(file, *words):
        path = EXAMPLES / file
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        monkeypatch.syspath_prepend(str(path.parent))
        sys.modules.pop("questions", None)
        runpy.run_path(str(path), run_name="__main__")

    return script


SMALL = ("--steps", "1", "--batch_size", "4", "--tokens", "4")


@pytest.mark.parametrize("loop", ["step", "train"])
def test_gpt2_to_positive_reviews(run, loop):
    run(
        "gpt2_sentiment.py",
        "--model",
        "gpt2",
        "--classifier",
        "classifier",
        "--dataset",
        "reviews",
        "--loop",
        loop,
        *SMALL,
    )
    assert Path("gpt2-positive/config.json").is_file()


@pytest.mark.parametrize("words", [(), ("--adapter",)])
def test_a_less_toxic_model(run, words):
    names = (
        "--model",
        "llama" if words else "gpt2",
        "--classifier",
        "classifier",
        "--label",
        "POSITIVE",
        "--dataset",
        "comments",
    )
    run("detoxify.py", *names, *SMALL, *words)
    assert Path("less-toxic", "adapter_config.json" if words else "config.json").is_file()


def test_rlhf_with_adapters_only(run):
    run("rlhf_adapters.py", "--model", "llama", "--dataset", "pairs", *SMALL)
    for file in ("sft/adapter_config.json", "reward/adapter_config.json", "ppo/adapter_config.json"):
        assert Path("rlhf-adapters", file).is_file()


def test_stack_llama(run):
    run("stack_llama/sft.py", "--model", "llama", "--dataset", "questions-and-answers", "--steps", "1")
    run("stack_llama/reward.py", "--model", "stack/sft", "--dataset", "questions-and-answers", "--steps", "1")
    run("stack_llama/rl.py", "--model", "stack/sft", "--dataset", "questions-and-answers", *SMALL)
    assert Path("stack/rl/adapter_config.json").is_file()
