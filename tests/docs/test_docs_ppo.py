"""What docs/ppo.md says can be done is done, as it is written, with tiny models under the names in it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.conftest import MODELS, make_tokenizer
from trl.cli.main import main
from trl.trainers.ppo.config import PPOConfig

TEXT = (Path(__file__).parents[2] / "docs" / "ppo.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line) for kind, block in BLOCKS if kind == "bash" for line in block.replace("\\\n", "").splitlines()
]


class Keyboard(io.StringIO):
    """A terminal in which somebody types."""

    def isatty(self):
        return True


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the names of the page stand for tiny models and files."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    sentiment = BertForSequenceClassification(BertConfig(vocab_size=99, pad_token_id=0, id2label=labels, **widths))
    for name, model in (("gpt2", MODELS["gpt2"]()), ("lvwerra/distilbert-imdb", sentiment)):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    prompts = ["The film was", "I went to see it", "What a", "In the end"] * 2
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "rewards.py").write_text(re.search(r"def no_repetition.*?\n\n", TEXT, re.DOTALL)[0])
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return home


def test_the_page_in_python(at_home):
    names: dict[str, object] = {}
    for block in [block for kind, block in BLOCKS if kind == "python"]:
        exec(block, names)
    assert names["trainer"].state.global_step == 1
    assert names["rate"].__name__ == "human_rating"
    assert (at_home / "gpt2-ppo" / "config.json").is_file()


def test_the_page_on_the_command_line(at_home, monkeypatch, capsys):
    demo, by_function, by_person, reward = COMMANDS
    assert main(demo[1:]) == 0
    assert (at_home / "trl-demo" / "ppo" / "report.html").is_file()
    assert main(by_function[1:]) == 0
    monkeypatch.setattr(sys, "stdin", Keyboard("5\n4\nwhat\n1\nq\n"))
    assert main(by_person[1:]) == 130
    assert "'what' is not one of 1, 2, 3, 4, 5, s, q." in capsys.readouterr().out
    assert len((at_home / "ratings.jsonl").read_text().splitlines()) == 3
    assert (at_home / "gpt2-human" / "checkpoint-1").is_dir()
    assert main([*reward[1:], "--max_steps", "1"]) == 0


def test_options_and_names_on_the_page_exist():
    known = {*PPOConfig.__dataclass_fields__, "peft_config", "num_shared_layers", "reward_funcs", "num_generations"}
    for name in re.findall(r"`([a-z_]+)=", TEXT):
        assert name in known | {"value_model", "reward_adapter", "answer", "top_k"}, name
