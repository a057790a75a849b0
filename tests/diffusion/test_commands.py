"""Commands that train diffusion models, from flags and YAML, and the page with their pictures."""

import json
import os

import pytest
import yaml

from tests.diffusion.pipelines import PIPELINES
from trl.cli.main import main

SHORT = "--num_inference_steps_eval 2 --guidance_scale 1 --max_steps 1 --report_to none --num_pictures 2 --use_peft --lora_r 2"
ROLLOUTS = f"{SHORT} --per_device_train_batch_size 2 --num_inference_steps 2 --reward_funcs brightness_reward"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a small pipeline, prompts, and a reward of one's own."""
    PIPELINES["sd"]().save_pretrained(tmp_path / "sd")
    rows = [{"prompt": "a red circle"}, {"prompt": "a blue square"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text("def dark(images):\n    return 1 - images.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
    return tmp_path


def trl(words):
    return main(words.split())


def test_ddpo_from_flags_and_its_page(home):
    words = f"ddpo --model_name_or_path ./sd --dataset_name prompts.jsonl --output_dir out {ROLLOUTS}"
    assert trl(words) == 0
    assert (home / "out" / "pytorch_lora_weights.safetensors").is_file()
    page = (home / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # two prompts, before and after
    assert "a blue square" in page
    assert "diffusers" in (home / "out" / "README.md").read_text()


def test_grpo_from_yaml(home):
    options = {"model_name_or_path": "./sd", "dataset_name": "prompts.jsonl", "output_dir": "out", "num_generations": 2}
    options |= {
        "per_device_train_batch_size": 2,
        "num_inference_steps": 2,
        "num_inference_steps_eval": 2,
        "max_steps": 1,
    }
    options |= {"guidance_scale": 1.0, "report_to": "none", "num_pictures": 0, "reward_funcs": ["rewards.py:dark"]}
    (home / "grpo.yaml").write_text(yaml.safe_dump(options))
    assert trl("diffusion-grpo --config grpo.yaml --use_peft --lora_r 2") == 0
    assert (home / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_check_shows_plan_memory_and_rewards(home, capsys):
    words = f"check ddpo --model_name_or_path ./sd --dataset_name prompts.jsonl --output_dir out {ROLLOUTS}"
    assert trl(words) == 0
    shown = capsys.readouterr().out
    for words in (
        "a red circle",
        "16 × 16 pixels",
        "denoising steps per optimizer step",
        "activations",
        "0.5",
        "Ready to train",
    ):
        assert words in shown
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ddpo --model_name_or_path ./sd --dataset_name prompts.jsonl --output_dir out", "reward_funcs is missing"),
        (
            "diffusion-grpo --model_name_or_path ./sd --dataset_name prompts.jsonl --output_dir out --reward_funcs "
            "think_format_reward",
            "has the argument 'completions'",
        ),
        (
            "ddpo --model_name_or_path ./sd --dataset_name prompts.jsonl --output_dir out --reward_funcs brightness_reward "
            "--num_inference_steps 0",
            "num_inference_steps=0",
        ),
    ],
)
def test_what_cannot_be_is_said(home, capsys, words, said):
    assert trl(words) != 0
    assert said in capsys.readouterr().err


def test_check_names_a_column_of_pairs_that_is_missing(home, capsys):
    size = "--height 16 --width 16 --output_dir out"
    assert trl(f"check diffusion-dpo --model_name_or_path ./sd --dataset_name prompts.jsonl {size}") == 2
    assert "no column 'chosen'" in capsys.readouterr().err
