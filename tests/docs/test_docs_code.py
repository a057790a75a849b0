"""What README and docs show is done, as it is written: Python runs, commands run, files are what they say they are.

Names of models and datasets stand for tiny ones in the folder in which the blocks of a page run, in their order. Blocks that are
`text` are output, or need a service. What cannot be run (servers, several processes, pages that wait for people) is read by the
command's own parser.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification

from tests.conftest import MODELS, make_tokenizer
from tests.vision.support import llava
from trl.cli.commands import methods, tools
from trl.cli.main import main
from trl.vision import families

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "docs/ppo.md",
    "docs/ddpo.md",
    "docs/diffusion.md",
}
"""Pages whose code is run by the files beside this one, with models of their own kinds."""

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if "```" in path.read_text(encoding="utf-8")
)
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"))
_BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"[A-Z_]+=")
"""The beginning of an assignment before a command."""
_LANGUAGES = {"python", "bash", "yaml", "jsonl", "json", "text", ""}
_NOT_RUN = {"pip", "make", "python", "eval", "accelerate", "torchrun", "apt-get", "pytest"}
"""Commands that are looked at and not run."""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        split = (shlex.split(line, comments=True) for line in lines)
        return [words for line in split if (words := list(dropwhile(_VARIABLE.match, line)))]


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, *match.groups(default="")) for match in _BLOCK.finditer(text)]


# ---- the folder in which pages run ----

CHATS = [
    {"messages": [{"role": "user", "content": "Is it far?"}, {"role": "assistant", "content": "Two hours."}]},
    {"messages": [{"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "From ten to four."}]},
] * 5
PAIRS = [{"prompt": "Is it far?", "chosen": " Two hours.", "rejected": " Yes."}] * 4
FILES = {
    "imdb/train.jsonl": [{"text": "The film was good."}] * 4,
    "stanfordnlp/imdb/train.jsonl": [{"text": "The film was good."}] * 4,
    "trl-lib/Capybara/train.jsonl": CHATS,
    "trl-lib/ultrafeedback_binarized/train.jsonl": PAIRS,
    "chats.jsonl": CHATS,
    "more.jsonl": CHATS,
    "mine.jsonl": CHATS,
    "quiz.jsonl": [{"task": "Is it far?", "solution": " Two hours."}] * 4,
    "pairs.jsonl": PAIRS,
    "labelled.jsonl": [
        {"prompt": "p", "completion": " c", "label": True},
        {"prompt": "p", "completion": " d", "label": False},
    ],
    "prompts.jsonl": [{"prompt": "The film was ", "solution": "4"}, {"prompt": "I went to see it ", "solution": "7"}]
    * 4,
    "qwen-sft/run.json": [{"log_history": [{"step": 1, "loss": 1.0}], "max_steps": 1}],
    "ratings.jsonl": [{"prompt": "Is it far?", "completion": " Two hours.", "score": 0.5}] * 2,
    "questions.jsonl": [{"prompt": "Is there a cup?", "image": "table.png", "label": "yes"}] * 2,
}
MODEL_NAMES = {
    "Qwen/Qwen2.5-0.5B": "llama",
    "Qwen/Qwen2.5-0.5B-Instruct": "llama",
    "gpt2": "gpt2",
    "facebook/opt-125m": "opt",
    "facebook/opt-350m": "opt",
}


SHORT = {
    '"train.tracker": None': '"train.tracker": None, "train.total_steps": 1, "train.batch_size": 8, "method.num_rollouts": 8, '
    '"method.chunk_size": 8, "method.gen_kwargs.max_new_tokens": 4, "train.eval_interval": 9'
}
"""What stands on a page, and what is run in a test."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    sentiment = BertForSequenceClassification(BertConfig(vocab_size=99, pad_token_id=0, id2label=labels, **widths))
    made = {name: MODELS[kind]() for name, kind in MODEL_NAMES.items()}
    rewards = BertForSequenceClassification(BertConfig(vocab_size=99, pad_token_id=0, num_labels=1, **widths))
    for name, model in {**made, "lvwerra/distilbert-imdb": sentiment, "org/reward-model": rewards}.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    seeing = llava()
    seeing.model.save_pretrained(folder / "Qwen/Qwen2.5-VL-3B-Instruct")
    seeing.processor.save_pretrained(folder / "Qwen/Qwen2.5-VL-3B-Instruct")
    return folder


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    """A folder in which the names of the pages are tiny models and files."""
    for folder in models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for name, rows in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_package").mkdir()
    for file, name in (("rewards.py", "short"), ("my_package/rewards.py", "polite")):
        (tmp_path / file).write_text(
            f"def {name}(completions, **columns):\n    return [-len(c) for c in completions]\n"
        )
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 24), (200, 30, 30)).save(tmp_path / "images" / "table.png")
    (tmp_path / "guidelines.md").write_text("Be fair.")
    (tmp_path / "base.yaml").write_text("learning_rate: 1.0e-5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"})
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    return tmp_path


# ---- what is done with a block ----


def run_command(words: list[str], page: str) -> None:
    """Run a command of `trl` on one process; look at any other.

    On the pages of methods and the quickstart it is the run of the Python there, in its folder: nothing may be shortened.
    """
    if words[0] != "trl":
        check_other(words)
    elif (
        words[1] in methods()
        and not asks_people(words)
        and "--num_processes" not in words
        and "--accelerate_config" not in words
        and "…" not in words
    ):
        limits = {"--report_to": "none", "--save_strategy": "no"}
        limits |= {} if page.startswith(("docs/methods/", "docs/quickstart")) else {"--max_steps": "1"}
        given = [word for name, value in limits.items() if name not in words for word in (name, value)]
        assert main([*words[1:], *given]) == 0, words
    elif words[1] in ("check", "preview", "report", "env") or (words[1] == "label" and "--export_to" in words):
        assert main(words[1:]) == 0, words
    elif words[1] in methods():
        methods()[words[1]].parser().parse([word for word in words[2:] if word != "…"])
    else:
        check_tool(words[1], words[2:])


def asks_people(words: list[str]) -> bool:
    """Whether a run would wait for somebody to answer."""
    files = [Path(word).read_text() for word in words if word.endswith(".yaml") and Path(word).is_file()]
    return any("human_" in text for text in [*words, *files])


def check_tool(name: str, words: list[str]) -> None:
    """Have a tool's own parser read the words."""
    tool = tools()[name]
    if tool.options:
        tool.read(words)


def check_other(words: list[str]) -> None:
    """What is called exists: extras of pip, targets of make, files of Python."""
    assert words[0] in _NOT_RUN, words
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if words[0] == "pip":
        named = [name for word in words for group in re.findall(r"\[([\w,]+)\]", word) for name in group.split(",")]
        assert set(named) <= set(project["optional-dependencies"]), words
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    if words[0] in ("python", "pytest") and "/" in words[1]:
        assert (ROOT / words[1]).exists(), words


def write_file(block: Block) -> None:
    """A block with a name is that file."""
    if block.language == "jsonl":
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
    name = block.title or (re.match(r"# ([\w-]+\.yaml)\n", block.text) or [None, None])[1]
    if name:
        Path(name).write_text(block.text)


def check_yaml(block: Block) -> None:
    """Keys of a file are options of some command."""
    content = yaml.safe_load(block.text)
    known = {option.name for method in methods().values() for option in method.options()} | {"env"}
    assert set(content) <= known, (block.page, set(content) - known)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_a_page_does_what_it_says(page, home):
    blocks = blocks_of(page)
    for block in blocks:
        assert block.language in _LANGUAGES, f"{page}: a block of {block.language!r} is not run"
        if block.language in ("yaml", "jsonl", "json"):
            write_file(block)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        if block.language == "python":
            code = block.text
            for words, short in SHORT.items():
                code = code.replace(words, short)
            exec(compile(code, page, "exec"), names)
        elif block.language == "yaml":
            check_yaml(block)
        elif block.language == "bash":
            for words in block.commands:
                run_command(words, page)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_runs(path, home, monkeypatch):
    """Its cells, in their order, with somebody who answers 4 when asked."""
    monkeypatch.setattr("builtins.input", lambda question: "4")
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before a commit"
            exec(compile("".join(cell["source"]), f"{path}, cell {number}", "exec"), names)


# ---- words ----


_QUOTED = re.compile(r"^> (.+)$|^\| (?:[^|]*; )?\"([^|\"]+ [^|\"]+)\" \|", re.MULTILINE)
"""A message on a line of its own, or in the first column of a table of remedies."""


def test_messages_that_pages_quote_are_in_the_source():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trl").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    quoted = {match[1] or match[2] for match in _QUOTED.finditer(pages)} - {"CUDA out of memory"}
    assert len(quoted) > 25
    for message in quoted:
        for part in filter(None, map(str.strip, re.split(r"…|\b\d+\b", message))):
            assert part in joined, message


@pytest.mark.parametrize("page", ["README.md", *(page for page in PAGES if page.startswith("docs/"))])
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[\w-]+)?\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


METHOD_PAGES = [
    *sorted(path for path in (ROOT / "docs" / "methods").glob("*.md") if path.stem != "index"),
    *(ROOT / "docs" / f"{name}.md" for name in ("ppo", "grpo", "rft", "ilql", "diffusion", "ddpo")),
]
PARTS = {
    "Rows": ("```jsonl",),
    "Run it": ("```python", "```yaml", "trl "),
    "Options that matter": ("| option | usual |", "learning_rate", "LoRA"),
    "What it logs": (),
    "What goes wrong": ("| what is seen | why | remedy |",),
    "Papers": ("arXiv:",),
}
"""Heading of each part of a method's page, and what has to be in it."""


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level, "" where there is none."""
    found = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


@pytest.mark.parametrize("path", METHOD_PAGES, ids=lambda path: path.stem)
def test_a_method_has_all_that_a_reader_looks_for(path):
    """An equation first; then every part, filled."""
    text = path.read_text(encoding="utf-8")
    assert re.match(r"# .*?^```(text)?\n.*?=", text.partition("\n## ")[0], re.DOTALL | re.MULTILINE), "no equation"
    for heading, wanted in PARTS.items():
        found = section(text, heading)
        assert found, (path.name, heading)
        assert [words for words in wanted if words not in found] == [], (path.name, heading)


def test_the_table_of_methods_leads_to_every_part():
    page = ROOT / "docs" / "methods" / "index.md"
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    linked = {(page.parent / re.search(r"\]\(([^)]+)\)", row)[1]).resolve() for row in rows}
    assert linked == set(METHOD_PAGES)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 2 + len(PARTS)
        anchors = [re.search(r"#([\w-]+)\)", cell)[1] for cell in cells[2:]]
        assert anchors == [heading.lower().replace(" ", "-") for heading in PARTS]
