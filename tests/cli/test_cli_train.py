"""Every training command trains in a process of its own, from a YAML file and from flags alone; one of them as installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml

from tests.processes import fast_python
from trl.cli.commands import methods
from trl.cli.main import main

SAMPLED = {"dataset_name": "prompts.jsonl", "max_completion_length": 4, "per_device_train_batch_size": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"dataset_name": "chats.jsonl", "assistant_only_loss": True, "max_length": 64},
    "reward": {"dataset_name": "pairs.jsonl", "center_rewards_coefficient": 0.01},
    "dpo": {"dataset_name": "pairs.jsonl", "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]},
    "cpo": {"dataset_name": "pairs.jsonl", "loss_type": "simpo"},
    "orpo": {"dataset_name": "pairs.jsonl", "beta": 0.2},
    "kto": {"dataset_name": "labels.jsonl", "desirable_weight": 1.1},
    "ilql": {"dataset_name": "rewarded.jsonl", "beta": 1.0, "steps_for_target_q_sync": 1},
    "rft": {**SAMPLED, "reward_funcs": ["rewards.py:short"], "num_generations": 2, "start_percentile": 0.5},
    "ppo": {**SAMPLED, "reward_funcs": ["rewards.py:short"], "batch_size": 4},
    "grpo": {
        **SAMPLED,
        "reward_funcs": ["accuracy_reward", "get_length_reward(target=4)"],
        "reward_weights": [1.0, 0.1],
        "loss_type": "dr_grpo",
        "epsilon_high": 0.28,
        "scale_rewards": False,
        "use_adaptive_entropy": True,
        "num_generations": 4,
        "log_completions": True,
        "num_completions_to_print": 1,
    },
    "rloo": {**SAMPLED, "reward_funcs": ["rewards:short"], "num_generations": 2, "beta": 0.01},
    "online-dpo": {**SAMPLED, "reward_funcs": ["./rewards.py:of_answer"], "beta": [0.2, 0.1]},
}
LOGGED = {
    "rft": ("reward", "kept_share", "percentile"),
    "ilql": ("loss/q", "loss/v", "loss/cql", "loss/awac", "awac_weight"),
    "grpo": (
        "reward",
        "rewards/accuracy_reward/mean",
        "rewards/length_reward/mean",
        "entropy_coef",
        "sampling/masked_share",
    ),
    "rloo": ("reward", "rewards/short/mean"),
    "online-dpo": ("reward", "rewards/of_answer/mean", "rewards/margins"),
}
"""Metrics beside the loss that tell that an option was heard."""

REWARDS = """
def short(completions, **columns):
    return [-float(len(text)) for text in completions]

async def of_answer(completions, solution):
    return [float(s in c) - len(c) / 100 for c, s in zip(completions, solution)]

def of_solutions(completions, solutions):
    return [0.0] * len(completions)

def fails(completions):
    return [1 / 0 for _ in completions]
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
    write(
        folder / "rewarded.jsonl",
        [{"prompt": asked[i], "completion": said[i], "reward": float(i)} for i in range(8)],
    )
    write(folder / "prompts.jsonl", [{"prompt": q, "solution": str(i)} for i, q in enumerate(asked)])
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def inside(folder, monkeypatch):
    """The folder as the current one, with what the command changes in this process put back afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
    return folder


def trained(folder: Path) -> dict:
    """What a run left, checked; its record."""
    assert (folder / "model.safetensors").is_file()
    assert "trained with" in (folder / "README.md").read_text()
    assert 'class="plot"' in (folder / "report.html").read_text()
    return json.loads((folder / "run.json").read_text())


class Ended(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def trl(folder) -> Callable[..., Ended]:
    """`trl("sft", "--max_steps", "1")`: how the command ended."""
    return partial(ended, folder, [fast_python(), "-m", "trl"])


def ended(folder: Path, command: list[str], *words: str) -> Ended:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def flags(options: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


ELSEWHERE = {"ddpo", "diffusion-grpo", "diffusion-nft", "diffusion-dpo"}
"""Commands that are tested in `tests/diffusion/test_commands.py`: their models are pipelines."""


def test_no_command_is_left_out():
    assert OPTIONS.keys() | ELSEWHERE == methods().keys()


def installed(folder: Path, *words: str) -> Ended:
    """How the installed command ended, from its start. It searches the current folder for no modules, as `-m` does."""
    return ended(folder, [str(Path(sys.executable).with_name("trl"))], *words)


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_from_a_file(folder, method, trl):
    """`max_steps` of the command line wins over the file's."""
    options = {"model_name_or_path": "tiny", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    options |= {"output_dir": f"file-{method}", "logging_steps": 1, "max_steps": 7} | OPTIONS[method]
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(options))
    words = [method, "--config", f"{method}.yaml", "--max_steps", "1"]
    done = installed(folder, *words) if method == "grpo" else trl(*words)
    assert done.status == 0, done.err
    assert done.out.count("'loss'") == 1
    assert trained(folder / f"file-{method}")["max_steps"] == 1
    for metric in LOGGED.get(method, ()):
        assert f"'{metric}'" in done.out
    if "log_completions" in OPTIONS[method]:
        table = pq.read_table(folder / f"file-{method}" / "completions" / "completions_00001.parquet").to_pylist()
        assert len(table) == 4
        assert {"accuracy_reward", "length_reward", "advantage"} <= set(table[0])


@pytest.mark.parametrize(
    "method",
    [name if name in ("sft", "reward", "grpo") else pytest.param(name, marks=pytest.mark.long) for name in OPTIONS],
)
def test_from_flags(folder, method, trl):
    """The preview shows a row; the run trains, and has no page where none is wanted."""
    words = [method, "--model_name_or_path", "tiny", "--output_dir", f"flags-{method}", "--use_cpu"]
    words += flags(OPTIONS[method])
    preview = trl("preview", *words, "--rows", "1")
    assert preview.status == 0, preview.err
    assert "row 1" in preview.out
    assert not (folder / f"flags-{method}").exists()
    done = trl(*words, "--max_steps", "1", "--logging_steps", "1", "--no_html_report", "--report_to", "none")
    assert done.status == 0, done.err
    for metric in ("loss", *LOGGED.get(method, ())):
        assert f"'{metric}'" in done.out
    assert (folder / f"flags-{method}" / "model.safetensors").is_file()
    assert not (folder / f"flags-{method}" / "report.html").exists()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("acuracy_reward", "Unknown reward function 'acuracy_reward'. Did you mean 'accuracy_reward'"),
        (
            "rewards.py:of_solutions",
            "'of_solutions' has the argument 'solutions', which is not a column of the dataset. Did you mean 'solution'",
        ),
        ("rewards.py:fails", "Reward function 'fails' raised ZeroDivisionError: division by zero. Sample 1 of 4"),
    ],
)
def test_what_is_wrong_with_rewards_is_one_message(reward, message, trl):
    words = flags({**SAMPLED, "num_generations": 4, "reward_funcs": reward, "output_dir": "none", "max_steps": 1})
    done = trl("grpo", "--model_name_or_path", "tiny", "--use_cpu", "--report_to", "none", *words)
    assert done.status == 2
    assert "trl: error: " in done.err
    assert message in done.err
    assert "Traceback" not in done.err


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
