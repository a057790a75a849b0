from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from trl.cli.main import main
from trl.demo.model import make_model, train_tokenizer
from trl.demo.options import DemoArguments
from trl.demo.reviews import load_reviews
from trl.demo.run import possible_endings, run_demo
from trl.demo.show import few_threads
from trl.demo.steps import SMALL

SHORT = ["--max_steps", "2", "--samples", "1", "--judged", "4", "--output_dir"]


@pytest.fixture
def few(monkeypatch):
    """The demo on few reviews and with small rollouts."""
    monkeypatch.setattr("trl.demo.run.load_reviews", lambda split: load_reviews(split).select(range(64)))
    for name, size in (("batch_size", 8), ("mini_batch_size", 4)):
        monkeypatch.setitem(SMALL["ppo"], name, size)


@pytest.mark.usefixtures("few")
def test_a_short_run_shows_samples_and_leaves_models(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", *SHORT, str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "million parameters",
        "64 held-out reviews",
        "an annotator, played by the grammar",
        "held-out pairs",
        "before PPO",
        "Of 4 samples",
    ):
        assert words in shown
    assert AutoModelForCausalLM.from_pretrained(str(folder / "sft")).config.model_type == "gpt2"
    page = (folder / "ppo" / "report.html").read_text()
    for words in (
        "are positive by the grammar",
        "The grammar also labelled the pairs",
        "plot",
        "Before and after",
        "rewards/sentiment/mean",
        "kl",
        "policy/entropy",
        "loss/value",
    ):
        assert words in page
    assert len((folder / "ppo" / "before_after.jsonl").read_text().splitlines()) == 4
    assert [row["step"] for row in json.loads((folder / "ppo" / "run.json").read_text())["log_history"]][:2] == [1, 2]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Folders of a language model and of a classifier, each with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("named")
    texts = load_reviews("test")["text"]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    tokenizer.pad_token = None
    make_model(tokenizer, width=32, depth=1).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    other = train_tokenizer(texts, vocab_size=300)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    BertForSequenceClassification(BertConfig(vocab_size=300, id2label=labels, **widths)).save_pretrained(
        folder / "sentiment"
    )
    other.save_pretrained(folder / "sentiment")
    return folder


@pytest.mark.usefixtures("few")
def test_a_model_and_a_classifier_by_name(named, tmp_path, capsys):
    names = ["--model_name_or_path", str(named / "gpt2"), "--reward_model_path", str(named / "sentiment")]
    assert main(["demo", *names, *SHORT, str(tmp_path / "demo")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("how much more likely its label 'POSITIVE' is", "Accuracy on held-out reviews", "Of 4 samples"):
        assert words in shown
    assert "The grammar also labelled" not in shown
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["ppo", "sft"]


def test_a_label_that_the_classifier_does_not_have(named, tmp_path, capsys):
    words = ["--reward_model_path", str(named / "sentiment"), "--positive_label", "good"]
    assert main(["demo", *words, *SHORT, str(tmp_path / "demo")]) == 2
    assert "Unknown positive_label 'good'. Known: NEGATIVE, POSITIVE." in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judged", "0"], "judged=0: give 1 to 600, the number of held-out reviews."),
        (["--positive_label", "good"], "positive_label is a label of the classifier reward_model_name_or_path"),
        (["--model_name_or_path", "./no"], "model_name_or_path='./no': there is no such folder."),
        (["--output", "x"], "Unknown option --output. Did you mean '--output_dir'"),
    ],
)
def test_refused(words, message, capsys):
    assert main(["demo", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "expected"), [(range(6), 3), (range(1, 6, 2), None)])
def test_possible_endings_are_those_of_positive_samples(rows, expected):
    texts = load_reviews("test").select(rows)["text"]  # every other one is positive, from the first on
    seeds = []

    def write(*, prompts, seed):
        seeds.append(seed)
        return texts

    assert possible_endings(write, texts, seed=7) == expected
    assert seeds == ([8, 9] if expected else list(range(8, 14)))


class Interrupting(io.StringIO):
    """Where Ctrl-C comes as soon as some words are shown."""

    def __init__(self, words):
        super().__init__()
        self.words = words

    def write(self, text):
        if self.words and self.words in text:
            self.words = ""
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


@pytest.mark.usefixtures("few")
def test_an_interrupt_ends_it_politely(tmp_path):
    screen = Interrupting("2 · Reward model")
    options = DemoArguments(max_steps=1, samples=1, judged=2, output_dir=str(tmp_path / "demo"))
    assert run_demo(options, Console(file=screen, width=200)) == 130
    assert screen.getvalue().endswith("are the models of the steps that ended: sft. `trl demo` begins anew.\n")


def test_help_imports_nothing_heavy():
    code = "import sys; from trl.cli.main import main; main(['demo', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--reward_model_name_or_path" in done.stdout
    assert done.stdout.endswith("False\n")


def test_threads_are_given_back():
    import torch

    before = torch.get_num_threads()
    with few_threads():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
