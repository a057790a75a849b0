"""Rows that fill up the last batches of several processes are run, and not counted."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests.conftest import make_tokenizer
from tests.diffusion.support import online
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.trainers.diffusion.grpo import DiffusionGRPOTrainer
from trl.trainers.kto import with_nothing
from trl.training.evaluated_rows import ByRow, Filled, Repeated, RowItems
from trl.types import Example

LABELLED = Dataset.from_dict(
    {"prompt": ["a", "b", "c", "d"], "completion": [" w", " x", " y", " zz"], "label": [True, False, True, False]}
)
TEXTS = Dataset.from_dict({"text": ["A fox.", "It runs.", "Far, far away.", "A dog."]})


def options(folder, **more):
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "html_report": False, **more}


def test_a_stream_is_filled_up_to_whole_batches():
    rows = Dataset.from_dict({"n": [1, 2, 3, 4, 5]}).to_iterable_dataset()
    found = list(Filled(rows, 4))
    assert [row["n"] for row in found] == [1, 2, 3, 4, 5, 1, 1, 1]
    assert [isinstance(row, Repeated) for row in found] == [False] * 5 + [True] * 3
    assert len(list(Filled(rows, 5))) == 5


def test_a_batch_says_which_items_are_of_which_row():
    per_row = {"packed": lambda rows: [item for row in rows for item in row["items"]], "plain": list}
    rows = [{"items": "ab"}, Repeated(items="c")]
    assert ByRow(per_row["packed"])([{"items": "ab"}, {"items": "c"}]) == RowItems([["a", "b"], ["c"]], counted=2)
    assert ByRow(per_row["plain"])(rows) == RowItems([[rows[0]], [rows[1]]], counted=1)
    assert ByRow(lambda rows: {"input_ids": rows})(rows) == {"input_ids": rows}


def packed(folder, model):
    args = SFTConfig(**options(folder, packing=True, max_length=16))
    return SFTTrainer(model, args, train_dataset=TEXTS, eval_dataset=TEXTS, tokenizer=make_tokenizer())


def labelled(folder, model):
    args = KTOConfig(**options(folder))
    return KTOTrainer(model, args=args, train_dataset=LABELLED, eval_dataset=LABELLED, tokenizer=make_tokenizer())


def pictures(folder, model):
    return online(DiffusionGRPOTrainer, folder, per_device_eval_batch_size=4)


@pytest.mark.parametrize("make", [packed, labelled, pictures])
def test_a_row_that_is_there_again_changes_no_metric(make, make_model, tmp_path):
    trainer = make(tmp_path, make_model("llama"))
    rows = trainer.train_dataset if make is pictures else trainer.eval_dataset
    (batch,) = trainer.get_eval_dataloader(rows)
    found = []
    for few in (batch.rows[:2], batch.rows):
        trainer.prediction_step(trainer.model, RowItems(few, counted=2), prediction_loss_only=True)
        found.append(trainer.meters["eval"].read(trainer._gather, trainer.args.device))
    assert len(batch.rows) > 2
    assert found[0] == pytest.approx(found[1])


def test_no_row_of_an_evaluation_is_dropped(make_model, tmp_path):
    found = []
    for drops in (False, True):
        args = SFTConfig(**options(tmp_path / str(drops), dataloader_drop_last=drops, per_device_eval_batch_size=3))
        trainer = SFTTrainer(make_model("llama"), args, eval_dataset=TEXTS, processing_class=make_tokenizer())
        found.append((trainer.evaluate()["eval_loss"], trainer.args.dataloader_drop_last))
    assert found == [(found[0][0], False), (found[0][0], True)]


class Passes(SFTTrainer):
    """Notes of every forward pass how many tokens count, and whether it keeps a graph."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        self.passes.append((batch.tokens, loss.requires_grad))
        return loss, metrics


def test_an_evaluation_goes_along_with_other_processes_and_counts_its_own_rows(make_model, tmp_path):
    args = SFTConfig(**options(tmp_path, per_device_eval_batch_size=3, max_steps=1))
    trainer = Passes(make_model("llama"), args, train_dataset=TEXTS, eval_dataset=TEXTS, tokenizer=make_tokenizer())

    def evaluated():
        trainer.passes = []
        metrics = trainer.evaluate()
        return {name: value for name, value in metrics.items() if "second" not in name and "runtime" not in name}

    alone = evaluated()
    passes = trainer.passes
    assert not any(has_graph for _, has_graph in passes)
    trainer._most = lambda count: count + 2  # as if another process had two more micro-batches in each batch
    assert evaluated() == alone
    dummies = [each for each in trainer.passes if each not in passes]
    assert dummies == [(0, False)] * 4
    del trainer._most
    (batch, _) = trainer.get_eval_dataloader()
    trainer.prediction_step(trainer.model, RowItems(batch.rows, counted=0), prediction_loss_only=True)
    assert not trainer.meters["eval"].read(trainer._gather, trainer.args.device)
    trainer.train()  # whose rows are no rows of an evaluation
    assert trainer.passes[-1][1]


def test_a_step_goes_along_with_other_processes(make_model, tmp_path):
    """Dummy passes change no number, and count no token."""
    found = []
    for more in (0, 2):
        args = SFTConfig(**options(tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=2))
        model = make_model("llama")
        trainer = Passes(model, args, train_dataset=TEXTS, tokenizer=make_tokenizer())
        trainer.passes, trainer._most = [], lambda count, more=more: count + more
        trainer.train()
        assert [tokens for tokens, _ in trainer.passes].count(0) == 2 * more
        logs = [
            {k: log[k] for k in ("loss", "grad_norm", "num_tokens", "entropy")} for log in trainer.state.log_history[:2]
        ]
        found.append((logs, model.lm_head.weight.detach()))
    assert found[0][0] == [pytest.approx(each) for each in found[1][0]]
    assert torch.allclose(found[0][1], found[1][1])


def test_kto_goes_along_with_other_processes_without_a_row_of_its_own(make_model, tmp_path):
    trainer = labelled(tmp_path, make_model("llama"))
    trainer._most = lambda count: 1
    assert trainer._divergence([], filling=[with_nothing(Example([5, 6], ()))]).item() == 0
