"""`trl check` and `--dry_run`: what they print, what they find wrong, and that nothing is trained."""

import json
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
    return tmp_path


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
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("options", "shown"), [([], True), (["--assistant_only_loss"], False)])
def test_conversations_that_are_trained_on_as_a_whole_are_said(options, shown, folder, capsys):
    turns = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "It is 1."}]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    assert main(["check", "sft", *words_for("chats.jsonl", *options)]) == 0
    assert ("all turns; with --assistant_only_loss" in " ".join(capsys.readouterr().out.split())) is shown


def test_rows_beyond_the_context_of_the_model_are_counted(folder, capsys):
    from tests.conftest import MODELS

    MODELS["llama"](max_position_embeddings=64).save_pretrained(folder / "tiny")
    more = ["--max_length", "null"]
    assert main(["check", "sft", *words_for("rows.jsonl", *more)]) == 0
    assert "1 longer than the model's context of 64 tokens" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["check", "sft"], ["sft"], ["preview"]])
def test_a_row_is_named_by_its_line(words, folder, capsys):
    rows = ['{"text": "one"}', "", '{"text": "two"}', '{"text": null}']
    (folder / "some.jsonl").write_text("\n".join(rows))
    assert main([*words, *words_for("some.jsonl")]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "Row 3 (line 4 of some.jsonl), column 'text': expected a string, found None." in shown


def test_rows_to_evaluate_on_are_looked_at_too(folder, capsys):
    (folder / "halves").mkdir()
    good, bad = json.dumps({"prompt": "Why?", "completion": " So."}), json.dumps({"prompt": "Why?", "completion": None})
    (folder / "halves" / "train.jsonl").write_text("\n".join([good] * 3))
    (folder / "halves" / "test.jsonl").write_text("\n".join([good] * 2))
    words = ["check", *words_for("halves", "--eval_strategy", "epoch")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "\ntrain: 3 rows, " in shown
    assert "\neval: 2 rows, " in shown
    (folder / "halves" / "test.jsonl").write_text("\n".join([good, bad]))
    assert main(words) == 2
    assert "Row 2 of 'eval' (line 2 of test.jsonl), column 'completion': expected a string" in capsys.readouterr().err


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
    assert "completions per rollout batch 8 = 2 prompts × 4 samples × 1 process" in shown
    assert "30 = 3 epochs of 10" in shown
    assert main(["check", "grpo", *words_for("prompts.jsonl", *more, "rewards.py:words")]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "words failed" in shown
    assert "Reward function 'words' gave a str ('many') where a number belongs." in shown
    assert "Ready" not in shown


PAIRS = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
ROUND = ["--reward_funcs", "rewards.py:short", "--max_completion_length", "8", "--use_cpu"]


@pytest.mark.parametrize(
    ("method", "row", "more", "plan"),
    [
        (
            "sft",
            {"text": "Why?"},
            ["--packing", "--max_length", "20", "--per_device_train_batch_size", "3"],  # 5 tokens each, 4 in a row
            "tokens per step 60 at most, 60 on average",
        ),
        ("sft", {"text": "Why?"}, ["--packing", "--max_length", "20"], "optimizer steps 3 = 3 epochs of 1"),
        ("reward", PAIRS, [], "optimizer steps 6 = 3 epochs of 2"),
        ("dpo", PAIRS, [], "optimizer steps 6 = 3 epochs of 2"),
        ("dpo", PAIRS, ["--precompute_ref_log_probs"], "optimizer steps 6 = 3 epochs of 2"),
        ("cpo", PAIRS, [], "optimizer steps 6 = 3 epochs of 2"),
        ("orpo", PAIRS, ["--use_peft", "--gradient_checkpointing"], "optimizer steps 6 = 3 epochs of 2"),
        (
            "kto",
            {"prompt": "Why?", "completion": " So.", "label": None},
            ["--gradient_accumulation_steps", "2"],
            "rows per step 16 = 8 per micro-batch × 2 accumulated",
        ),
        (
            "ppo",
            {"prompt": "Why?"},
            [*ROUND, "--batch_size", "4", "--mini_batch_size", "2"],
            "optimizer steps per rollout batch 8",
        ),
        ("rloo", {"prompt": "Why?"}, ROUND, "completions per rollout batch 8 = 4 prompts × 2 samples"),
        ("online-dpo", {"prompt": "Why?"}, ROUND, "completions per rollout batch 16 = 8 prompts × 2 samples"),
    ],
)
def test_every_method_has_a_plan_and_an_estimate(method, row, more, plan, folder, capsys):
    """12 rows in steps of 8, unless a row says otherwise."""
    rows = [{**row, "label": i % 2 == 0} if "label" in row else row for i in range(12)]
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["check", method, *words_for("few.jsonl", *more)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert plan in shown
    assert "activations" in shown
    assert ("short -18" in shown) == ("--reward_funcs" in more)
    assert shown.endswith("Ready to train.")
    assert not (folder / "out").exists()


def test_a_folder_without_weights_is_a_reason(folder, capsys):
    (folder / "tiny" / "model.safetensors").unlink()
    assert main(["check", *words_for("rows.jsonl")]) == 1
    assert "✗ Model: model_name_or_path='tiny': the folder holds no weights" in capsys.readouterr().out


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
    assert problem.startswith(
        "Memory: a step takes 20.00 GiB, but only 8.00 GiB are free. To save memory:\n    --gradient_checkpointing"
    )
    assert "--per_device_train_batch_size 4 --gradient_accumulation_steps 2" in problem
    assert "--max_length 512" in problem
    assert memory_problems(MemoryEstimate(parts, "cpu", available=2**35), run) == []
