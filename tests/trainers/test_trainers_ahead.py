"""The next window is laid out before the device is waited for, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.training import step_trainer

ROWS = Dataset.from_list([{"prompt": "Is it far?", "completion": " yes" * (1 + i % 4)} for i in range(10)])
PAIRS = ROWS.rename_column("completion", "chosen").add_column("rejected", [" no"] * 10)


def trainer(method, config, rows, model, tokenizer, folder, **options):
    args = config(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        **{"save_strategy": "no", **options},
    )
    return method(model, args=args, train_dataset=rows, processing_class=tokenizer)


def logged(run):
    return [(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("method", "config", "rows"), [(SFTTrainer, SFTConfig, ROWS), (DPOTrainer, DPOConfig, PAIRS)])
def test_numbers_stay_over_epochs_and_windows_of_other_sizes(method, config, rows, make_model, tokenizer, tmp_path):
    found = {}
    for ahead in (False, True):
        run = trainer(method, config, rows, make_model("llama"), tokenizer, tmp_path / str(ahead))
        run.lays_out_ahead = ahead
        run.train()
        found[ahead] = logged(run)
    assert found[True] == found[False]
    assert len(found[True]) == 6  # of two, two and one batch, twice


def test_the_next_window_is_laid_out_first(make_model, tokenizer, tmp_path, monkeypatch):
    options = {"gradient_checkpointing": False}  # a plan would lay out rows, too
    run = trainer(SFTTrainer, SFTConfig, ROWS, make_model("llama"), tokenizer, tmp_path, **options)
    run.lays_out_ahead, events, collate = True, [], run.collate
    monkeypatch.setattr(run, "collate", lambda items: events.append("lay out") or collate(items))
    finite = step_trainer.is_finite
    monkeypatch.setattr(step_trainer, "is_finite", lambda norm: events.append("wait") or finite(norm))
    run.train()
    epoch = ["lay out", "lay out", "wait", "lay out", "wait", "wait"]
    assert events == ["lay out", "lay out", *epoch, "lay out", "lay out", *epoch]


def test_a_run_that_goes_on_from_a_checkpoint_is_the_same(make_model, tokenizer, tmp_path):
    def run(folder, **options):
        made = trainer(SFTTrainer, SFTConfig, ROWS, make_model("llama"), tokenizer, folder, **options)
        made.lays_out_ahead = True
        return made

    whole = run(tmp_path / "a")
    whole.train()
    run(tmp_path / "b", save_strategy="steps", save_steps=2).train()
    again = run(tmp_path / "b", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert logged(again)[-4:] == logged(whole)[-4:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
