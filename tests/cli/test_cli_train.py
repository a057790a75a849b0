"""Every training command trains: from a YAML file in a process of its own, and from flags."""

import ast
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trl.cli.main import main

OPTIONS = {
    "sft": {"dataset_name": "chats.jsonl", "assistant_only_loss": True, "max_length": 64},
    "reward": {"dataset_name": "pairs.jsonl", "center_rewards_coefficient": 0.01},
    "dpo": {"dataset_name": "pairs.jsonl", "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]},
    "cpo": {"dataset_name": "pairs.jsonl", "loss_type": "simpo"},
    "orpo": {"dataset_name": "pairs.jsonl", "beta": 0.2},
    "kto": {"dataset_name": "labels.jsonl", "desirable_weight": 1.1},
    "ppo": {
        "dataset_name": "prompts.jsonl",
        "reward_funcs": ["rewards.py:short"],
        "max_completion_length": 4,
        "batch_size": 4,
        "mini_batch_size": 2,
    },
}
REWARDS = """
def short(completions, **columns):
    return [-float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny model, its tokenizer, and files of all kinds of rows."""
    from tests.conftest import MODELS, make_tokenizer

    folder = tmp_path_factory.mktemp("train")
    MODELS["llama"]().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    asked, said = [f"What is {i}?" for i in range(8)], [f" It is {i}." for i in range(8)]
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in zip(asked, said, strict=True)
    ]
    write(folder / "chats.jsonl", [{"messages": chat} for chat in turns])
    write(folder / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": " No."} for q, a in zip(asked, said)])  # noqa: B905
    write(
        folder / "labels.jsonl",
        [{"prompt": asked[i], "completion": said[i], "label": i % 2 == 0} for i in range(8)],
    )
    write(folder / "prompts.jsonl", [{"prompt": q} for q in asked])
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def inside(folder, monkeypatch):
    """The folder as the current one, with what the command changes in this process put back afterwards."""
    logger = logging.getLogger("trl")
    before = (logger.handlers[:], logger.level, logger.propagate)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
    yield folder
    logger.handlers, logger.level, logger.propagate = before


def trained(folder: Path) -> dict:
    """What a run left, checked; its record."""
    assert (folder / "model.safetensors").is_file()
    assert "base_model" in (folder / "README.md").read_text()
    assert "<svg" in (folder / "report.html").read_text()
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("method", OPTIONS)
def test_from_a_file_in_a_process_of_its_own(folder, method):
    """`max_steps` of the command line wins over the file's."""
    options = {"model_name_or_path": "tiny", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    options |= {"output_dir": f"file-{method}", "logging_steps": 1, "max_steps": 7} | OPTIONS[method]
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(options))
    words = [sys.executable, "-m", "trl", method, "--config", f"{method}.yaml", "--max_steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'loss'") == 1
    assert trained(folder / f"file-{method}")["max_steps"] == 1


@pytest.mark.parametrize("method", OPTIONS)
def test_from_flags(inside, method, capsys):
    """The preview shows a row; the run trains, and has no page where none is wanted."""
    words = f"{method} --model_name_or_path tiny --output_dir flags-{method} --use_cpu".split()
    for name, value in OPTIONS[method].items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    assert main(["preview", *words, "--rows", "1"]) == 0
    assert "row 1" in capsys.readouterr().out
    assert not (inside / f"flags-{method}").exists()
    assert main([*words, "--max_steps", "1", "--logging_steps", "1", "--no_html_report", "--report_to", "none"]) == 0
    assert "'loss'" in capsys.readouterr().out
    assert (inside / f"flags-{method}" / "model.safetensors").is_file()
    assert not (inside / f"flags-{method}" / "report.html").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_an_adapter_on_quantised_weights_learns(inside, method, bits, capsys):
    """DPO asks the model without its adapter between steps: 4-bit weights must not be packed anew there."""
    words = (
        f"{method} --model_name_or_path tiny --output_dir {method}{bits} --use_cpu --use_peft {bits} --report_to none"
    )
    words += f" --dataset_name {OPTIONS[method]['dataset_name']} --lora_target_modules all-linear --max_steps 4"
    words += " --logging_steps 1 --learning_rate 1e-2 --lr_scheduler_type constant --lora_dropout 0"
    assert main(words.split()) == 0
    logged = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])
    assert (inside / f"{method}{bits}" / "adapter_model.safetensors").is_file()
