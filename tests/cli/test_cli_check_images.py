"""`trl check` on rows with images: what they become, the plan and the memory, on a model without weights."""

from __future__ import annotations

import json

import datasets
import pytest

from tests.vision.support import llava, picture
from trl.cli.main import main


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    tiny = llava()
    tiny.model.save_pretrained("reader")
    tiny.processor.save_pretrained("reader")
    (tmp_path / "pictures").mkdir()
    picture(1, 200, 150).save("pictures/1.png")
    return tmp_path


@pytest.mark.long
def test_rows_of_rlaif_v(home, capsys):
    """With columns that nobody reads, images in a folder of their own, and an adapter."""
    row = {
        "question": "what is it?",
        "image": "1.png",
        "chosen": "a box",
        "rejected": "a dog",
        "idx": 1,
        "origin_split": "{}",
    }
    (home / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 2)
    words = ["--image_folder", "pictures", "--max_pixels", "10000", "--use_peft", "--lora_target_modules", "all-linear"]
    assert main(["check", "dpo", "--model_name_or_path", "reader", "--dataset_name", "pairs.jsonl", *words]) == 0
    shown = capsys.readouterr().out
    assert "user: [4 image tokens]what is it?" in shown
    assert "The activations of the image encoder are not included" in shown
    assert "Ready to train" in shown


def test_an_image_that_breaks_off_is_found_before_training(home, capsys):
    whole = (home / "pictures" / "1.png").read_bytes()
    (home / "pictures" / "2.png").write_bytes(whole[: len(whole) // 2])
    row = {"prompt": "what is it?", "completion": "a box", "image": "pictures/2.png"}
    (home / "rows.jsonl").write_text(json.dumps(row))
    assert main(["check", "sft", "--model_name_or_path", "reader", "--dataset_name", "rows.jsonl", "--rows", "0"]) == 1
    assert "2.png' cannot be decoded" in " ".join(capsys.readouterr().out.split())
