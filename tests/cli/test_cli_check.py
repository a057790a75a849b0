"""`trl check` and `--dry_run`: what they print, what they find wrong, and that nothing is trained."""

import json
import logging
import os
from pathlib import Path

import pytest

from trl.cli.main import main

REWARDS = """
def short(completions, **columns):
    return [-float(len(text)) for text in completions]

def words(completions, **columns):
    return ["many" for text in completions]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    from tests.conftest import MODELS, make_tokenizer

    MODELS["llama"]().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i}." * (1 + 9 * (i == 3))} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    logger = logging.getLogger("trl")
    before = (logger.handlers[:], logger.level, logger.propagate)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
    yield tmp_path
    logger.handlers, logger.level, logger.propagate = before


def words_for(data: str, *more: str) -> list[str]:
    return ["--model_name_or_path", "tiny", "--dataset_name", data, "--use_cpu", "--output_dir", "out", *more]


@pytest.mark.parametrize("words", [["check", "sft"], ["sft", "--dry_run"]])
def test_rows_plan_and_memory(words, folder, capsys):
    """20 rows, 4 to a step and process: 5 steps an epoch; with two processes 3. One row is longer than 64 tokens."""
    more = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_length", "64"]
    assert main([*words, *words_for("rows.jsonl", *more)]) == 0
    shown = capsys.readouterr().out
    assert "⟦ It is 0.</s>⟧" in shown
    assert "1 truncated" in shown
    assert "4 = 2 per micro-batch × 2 accumulated × 1 process" in shown
    assert "256 at most" in shown
    assert "15 = 3 epochs of 5" in shown
    for part in ("weights", "optimizer", "activations", "together"):
        assert f"\n  {part} " in shown
    assert "Ready to train." in shown
    assert not list((folder / "out").glob("*"))


def test_processes_count(folder, capsys):
    more = ["--per_device_train_batch_size", "4", "--num_processes", "2"]
    assert main(["check", *words_for("rows.jsonl", *more)]) == 0
    shown = capsys.readouterr().out
    assert "8 = 4 per micro-batch × 1 accumulated × 2 processes" in shown
    assert "9 = 3 epochs of 3" in shown
    assert "buckets of gradients" in shown


def test_a_reward_that_fails_is_named(folder, capsys):
    more = ["--max_completion_length", "8", "--num_generations", "4", "--reward_funcs", "rewards.py:short"]
    assert main(["check", "grpo", *words_for("prompts.jsonl", *more)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "short -18" in shown
    assert "8 = 8 per micro-batch" in shown
    assert "30 = 3 epochs of 10" in shown
    assert main(["check", "grpo", *words_for("prompts.jsonl", *more, "rewards.py:words")]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "words failed" in shown
    assert "Reward function 'words' gave a str ('many') where a number belongs." in shown
    assert "Ready" not in shown


def test_a_folder_without_weights_is_a_reason(folder, capsys):
    (folder / "tiny" / "model.safetensors").unlink()
    assert main(["check", *words_for("rows.jsonl")]) == 1
    assert "✗ Model: the folder 'tiny' holds no weights" in capsys.readouterr().out


def test_columns_that_a_method_does_not_take(folder, capsys):
    assert main(["check", "dpo", *words_for("rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "'completion'" in error
    assert "chosen" in error


def test_what_to_change_where_memory_does_not_suffice():
    from trl.cli.check import memory_problems
    from trl.cli.commands import methods
    from trl.cli.estimate import MemoryEstimate
    from trl.cli.train import read_run

    method = methods()["sft"]
    run = read_run(
        method, method.parser().parse(["--dataset_name", "imdb", "--model_name_or_path", "gpt2", "--use_cpu"])
    )
    parts = {"weights": 2**30, "gradients": 2**30, "optimizer": 2**31, "activations": 2**34}
    (problem,) = memory_problems(MemoryEstimate(parts, "cpu", available=2**33), run)
    assert problem.startswith("Memory: a step takes 20.00 GiB, and 8.00 GiB are free. --gradient_checkpointing")
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in problem
    assert "--max_length 512" in problem
    assert memory_problems(MemoryEstimate(parts, "cpu", available=2**35), run) == []
