"""An output folder belongs to one run: another is refused, or overwrites it where that is asked for."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import make_tokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.errors import ConfigError
from trl.training.output_folder import (
    OWNER_FILE,
    check_folder,
    check_space,
    check_writable,
    checkpoint_bytes,
    claim,
    has_results,
    remove_results,
)

TEXTS = {"text": ["A fox runs.", "So it does."]}
PAIRS = {"prompt": ["Why"] * 2, "chosen": [" so"] * 2, "rejected": [" no"] * 2}
LORA = LoraConfig(r=2, target_modules=["q_proj"])


def options(folder, **kw):
    shown = {"save_strategy": "no", "disable_tqdm": True, "html_report": False, "report_to": [], "max_steps": 1}
    return {"output_dir": str(folder), "per_device_train_batch_size": 2, **shown, **kw}


def sft(model, folder, *, rows=TEXTS, peft_config=None, **kw):
    args = SFTConfig(**options(folder, **kw))
    data = Dataset.from_dict(rows)
    return SFTTrainer(model, args, train_dataset=data, processing_class=make_tokenizer(), peft_config=peft_config)


@pytest.fixture
def used(make_model, tmp_path):
    """A folder with a checkpoint and the model of a run."""
    trainer = sft(make_model("llama"), tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    return tmp_path


def test_the_same_run_may_be_made_again(make_model, used, caplog):
    sft(make_model("llama"), used, save_strategy="steps", save_steps=1, logging_steps=3).train()
    assert "refused" not in caplog.text
    assert "holds checkpoint-1 of this run, but training starts from the beginning: to resume" in caplog.text


def test_a_precision_that_is_the_default_may_be_written_out(make_model, tmp_path):
    """As commands do: `trl sft` after the same run in Python."""
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    name, folder = str(tmp_path / "model"), tmp_path / "out"
    trainer = sft(name, folder)
    trainer.train()
    trainer.save_model()
    sft(name, folder, model_init_kwargs={"dtype": "float32"}).train()
    with pytest.raises(ConfigError, match="holds another run.*float32.*there.*bfloat16.*here"):
        sft(name, folder, model_init_kwargs={"dtype": "bfloat16"}).train()


OTHERS = {
    "method": lambda make, folder: DPOTrainer(
        make("llama"),
        args=DPOConfig(**options(folder)),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=make_tokenizer(),
    ),
    "adapter": lambda make, folder: sft(make("llama"), folder, peft_config=LORA),
    "rows": lambda make, folder: sft(make("llama"), folder, rows={"text": ["Another.", "And one."]}),
    "option": lambda make, folder: sft(make("llama"), folder, learning_rate=1e-3),
}
NAMED = {
    "method": "SFTTrainer.*DPOTrainer",
    "adapter": "adapter",
    "rows": "2 rows there, and others here",
    "option": "learning_rate.*0.001",
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_refused_before_its_first_step(make_model, used, other, caplog):
    trainer = OTHERS[other](make_model, used)
    said = "train() will fail, unless it resumes a run: output_dir="
    assert (said in caplog.text) == (other in ("method", "option"))  # what is known before rows are encoded
    before = sorted(path.name for path in used.iterdir())
    with pytest.raises(ConfigError, match=f"(?s)holds another run.*{NAMED[other]}.*overwrite_output_dir.*--resume"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert sorted(path.name for path in used.iterdir()) == before


def test_one_that_overwrites_leaves_nothing_of_the_other(make_model, used):
    trainer = sft(make_model("llama"), used, peft_config=LORA, overwrite_output_dir=True)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in used.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"model.safetensors", "config.json", "checkpoint-1"}


def test_the_model_that_is_trained_is_not_replaced(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    trainer = sft(str(tmp_path), tmp_path, overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="folder of the model to train"):
        trainer.train()
    assert (tmp_path / "model.safetensors").exists()


def test_the_adapter_that_is_trained_on_is_not_replaced(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    first = sft(str(tmp_path / "base"), tmp_path / "adapter", peft_config=LORA)
    first.train()
    first.save_model()
    trainer = sft(str(tmp_path / "adapter"), tmp_path / "adapter", overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="folder of the model to train"):
        trainer.train()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_model_from_elsewhere_is_not_written_over(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="without a record of its settings"):
        sft(make_model("llama"), tmp_path).train()


def test_folders_without_results_belong_to_nobody(make_model, tmp_path):
    sft(make_model("llama"), tmp_path).train()
    trainer = sft(make_model("llama"), tmp_path, learning_rate=1e-3)
    trainer.train()
    assert not (tmp_path / OWNER_FILE).exists()
    trainer.save_model()
    assert json.loads((tmp_path / OWNER_FILE).read_text())["options"]["learning_rate"] == 1e-3


def test_the_same_folder_by_another_path_is_the_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    run = {"trainer": "A", "model": "model", "adapter": "", "optim": "", "parameters": {}, "rows": {}, "options": {}}
    claim("out", run)
    (tmp_path / "out" / "checkpoint-1").mkdir()
    check_folder("out", {**run, "model": str(tmp_path / "model")}, overwrite=False)
    with pytest.raises(ConfigError, match="model.*there, 'other' here"):
        check_folder("out", {**run, "model": "other"}, overwrite=False)


RUN = {"trainer": "A", "model": "m", "optim": "", "parameters": {}, "rows": {"count": 2}, "options": {"seed": 1}}


def test_only_what_both_runs_say_is_compared(tmp_path):
    """Before rows are encoded, rows and parameters are not known; another release has other options."""
    claim(tmp_path, {**RUN, "adapter": "lora", "options": {"seed": 1, "gone": 2}})
    (tmp_path / "checkpoint-1").mkdir()
    early = {name: RUN[name] for name in ("trainer", "model", "optim")}
    check_folder(tmp_path, {**early, "options": {"seed": 1, "new": 3}}, overwrite=False)
    for other in ({"seed": 2, "new": 3}, {"gone": 3}):
        with pytest.raises(ConfigError, match="(seed 1 there, 2|gone 2 there, 3) here"):
            check_folder(tmp_path, {**early, "options": other}, overwrite=False)
    claim(tmp_path, {**RUN, "rows": None})  # of a stream; and a record without adapters
    check_folder(tmp_path, {**RUN, "adapter": "lora"}, overwrite=False)


def test_a_folder_may_have_the_name_of_a_model_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_folder("gpt2", {**RUN, "model": "gpt2"}, overwrite=False)
    (tmp_path / "gpt2").mkdir()
    check_folder("gpt2", {**RUN, "model": "gpt2"}, overwrite=False)


def test_what_is_removed_of_an_earlier_run_is_its_checkpoints_and_its_model(tmp_path):
    """A model in several files has an index, from which another in one file would be read wrongly."""
    kept = {"README.md", "tokenizer.json", "notes", "training_args.bin"}
    model = {
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
    }
    for name in kept | model:
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-1").mkdir()
    remove_results(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    (tmp_path / "config.json").touch()
    assert not has_results(tmp_path)
    assert not has_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("has_optimizer", "only_trained", "size"),
    [(True, False, 208), (False, False, 80), (True, True, 192), (False, True, 64)],
)
def test_bytes_of_a_checkpoint_by_hand(has_optimizer, only_trained, size):
    """16 trained numbers of 4 bytes, with two moments each; 8 frozen ones of 2 bytes."""
    model = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(2, 4, bias=False).half().requires_grad_(False)])
    assert checkpoint_bytes(model, has_optimizer=has_optimizer, only_trained=only_trained) == size


def test_a_checkpoint_may_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    check_space(tmp_path, 1000)
    with pytest.raises(ConfigError, match="a checkpoint takes about"):
        check_space(tmp_path, 1001)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # root may write to any folder
    with pytest.raises(ConfigError, match=f"output_dir='{tmp_path}' cannot be written to"):
        check_writable(tmp_path)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_said_at_the_start(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    trainer = sft(make_model("llama"), tmp_path, save_strategy="steps", save_steps=1)
    whole = sum(p.numel() for p in trainer.model.parameters())
    assert checkpoint_bytes(trainer.model, has_optimizer=True, only_trained=False) == 3 * 4 * whole
    with pytest.raises(ConfigError, match="a checkpoint takes about .* but only .* are free.*save_only_model"):
        trainer.train()
    sft(make_model("llama"), tmp_path).train()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000))
    with pytest.raises(ConfigError, match="the model takes about .* but only .* are free. Make room, or name a folder"):
        trainer.check_space(has_checkpoints=False)


@pytest.mark.parametrize("inside", ["", "out"])
def test_a_folder_that_cannot_be_made_is_named_before_rows_are_encoded(make_model, tmp_path, inside):
    file = tmp_path / "notes.txt"
    file.write_text("Hi")
    with pytest.raises(ConfigError, match=r"output_dir='.*notes.txt.*' cannot be created"):
        sft(make_model("llama"), file / inside, rows={"text": [1, 2]})
