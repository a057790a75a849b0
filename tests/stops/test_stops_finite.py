"""Losses and gradients that are not finite: steps skipped and counted, the run ended with the rows named."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.conftest import MODELS, make_tokenizer
from trl.data.layout import lay_out
from trl.errors import ConfigError
from trl.models.value_heads.auto_models import with_value_head
from trl.trainers.dpo import DPOConfig, DPOTrainer
from trl.trainers.kto import KTOConfig, KTOTrainer
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer
from trl.trainers.sft import SFTConfig, SFTTrainer
from trl.training.checkpoint import newest_checkpoint
from trl.training.metrics import Meter
from trl.training.nonfinite import (
    NonFiniteError,
    SkippedSteps,
    Window,
    is_finite,
    items_with_bad_gradients,
    items_with_bad_losses,
    nonfinite_parameters,
    propagate_nonfinite,
)
from trl.training.window import dummy_batch
from trl.types import Completion, Example

BAD = "Z"
OPTIONS = {
    "per_device_train_batch_size": 1,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
    "html_report": False,
}


def rows(*bad: int, count: int = 8) -> Dataset:
    return Dataset.from_dict({"text": [f"row {i} {BAD if i in bad else 'a'}" for i in range(count)]})


def broken_model() -> torch.nn.Module:
    """A model in which one token stands for infinity."""
    torch.manual_seed(0)
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.embed_tokens.weight[make_tokenizer().convert_tokens_to_ids(BAD)] = torch.inf
    return model


class Watch(TrainerCallback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights.append(model.lm_head.weight.detach().clone())


def make(folder, *bad: int, cls=SFTTrainer, model=None, callbacks=(), **options) -> SFTTrainer:
    args = SFTConfig(output_dir=str(folder), **{**OPTIONS, **options})
    model = broken_model() if model is None else model
    return cls(model, args, train_dataset=rows(*bad), tokenizer=make_tokenizer(), callbacks=list(callbacks))


def logged(trainer, name: str) -> list:
    return [entry.get(name) for entry in trainer.state.log_history if "loss" in entry]


class FlatAtZero(SFTTrainer):
    """The loss is finite everywhere, the gradient of rows with the bad token is not: √x at zero."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        is_bad = batch.target == self.tokenizer.convert_tokens_to_ids(BAD)
        return torch.where(is_bad, torch.where(is_bad, loss - loss.detach(), 1.0).sqrt(), loss), metrics


class LostInAConstant(SFTTrainer):
    """The loss of rows with the bad token is NaN, by a term that has no gradient."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        is_bad = batch.target == self.tokenizer.convert_tokens_to_ids(BAD)
        return loss + torch.where(is_bad, math.nan, 0.0), metrics


class Averaged(SFTTrainer):
    """Returns a mean, which the weights of the batch would average once more."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        return loss.mean(), metrics


def sane_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS["llama"]()


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize(
    ("cls", "model"), [(SFTTrainer, broken_model), (FlatAtZero, sane_model), (LostInAConstant, sane_model)]
)
def test_such_a_step_changes_nothing_and_is_counted(tmp_path, cls, model, clip):
    watch = Watch()
    trainer = make(tmp_path, 2, cls=cls, model=model(), callbacks=[watch], max_grad_norm=clip)
    trainer.train()
    moved = [not torch.equal(a, b) for a, b in pairwise(watch.weights)]
    assert moved == [True, False, True, True, True]
    assert logged(trainer, "skipped_steps") == [None, None, 1, 1, 1, 1]
    assert [math.isfinite(loss) for loss in logged(trainer, "loss")] == [True, True, False, True, True, True]
    assert logged(trainer, "grad_norm")[2] is None
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {5}
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2 * (6 - k) / 6 for k in range(6)])


def test_what_is_logged_is_the_mean_of_the_steps_that_were_taken(tmp_path):
    each = make(tmp_path, 2, model=broken_model())
    each.train()
    thrice = make(tmp_path, 2, model=broken_model(), logging_steps=3)
    thrice.train()
    losses = logged(each, "loss")
    assert logged(thrice, "loss") == pytest.approx([sum(losses[:2]) / 2, sum(losses[3:]) / 3], rel=1e-5)
    final, taken = each.state.log_history[-1], [*losses[:2], *losses[3:]]
    assert (final["train_loss"], final["skipped_steps"]) == (pytest.approx(sum(taken) / 5, rel=1e-5), 1)
    accuracies = logged(each, "mean_token_accuracy")
    assert accuracies[2] is None
    assert logged(thrice, "mean_token_accuracy")[0] == pytest.approx(sum(accuracies[:2]) / 2, rel=1e-5)


def test_several_in_a_row_end_the_run_and_leave_the_checkpoint(tmp_path):
    options = {"max_skipped_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, 1, 3, 4, **options)
    words = (
        r"not finite in 2 steps in a row, the last of them step 5; max_skipped_steps=2 ends the run here\. Rows of the "
        r"last step whose loss is not finite: train_dataset\[4\] 'row 4 Z</s>'\. These steps did not change"
    )
    with pytest.raises(NonFiniteError, match=words):
        trainer.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert all(value.isfinite().all() for name, value in trainer.model.named_parameters() if "embed" not in name)
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert again.steps.skipped == 2


def test_rows_are_named_by_their_gradient_where_the_loss_is_finite(tmp_path):
    """Also where only embeddings are trained, most of whose gradient is finite: other tokens' is zero."""
    for frozen in (False, True):
        model = sane_model().requires_grad_(not frozen)
        model.model.embed_tokens.requires_grad_(True)
        trainer = make(tmp_path, 2, cls=FlatAtZero, model=model, max_skipped_steps=1, per_device_train_batch_size=3)
        with pytest.raises(NonFiniteError, match=r"whose gradient is not finite: train_dataset\[2\] 'row 2 Z</s>'\."):
            trainer.train()


class FlatFeedback(KTOTrainer):
    """As `FlatAtZero`, of completions."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        is_bad = (batch.target == self.tokenizer.convert_tokens_to_ids(BAD)).any(1)
        return torch.where(is_bad, torch.where(is_bad, loss - loss.detach(), 1.0).sqrt(), loss), metrics


def test_gradients_of_rows_are_those_in_their_window(tmp_path):
    """KTO's divergence is that of the step, and no row has one of its own."""
    columns = {"prompt": [f"row {i} " for i in range(3)], "completion": ["a", "b", BAD], "label": [True, False, True]}
    args = KTOConfig(str(tmp_path), **{**OPTIONS, "max_skipped_steps": 1, "per_device_train_batch_size": 3})
    trainer = FlatFeedback(
        sane_model(), args=args, train_dataset=Dataset.from_dict(columns), tokenizer=make_tokenizer()
    )
    with pytest.raises(NonFiniteError, match=r"whose gradient is not finite: train_dataset\[2\] 'row 2 Z</s>'\."):
        trainer.train()


def test_rows_are_named_where_a_loss_is_that_of_a_pair(tmp_path):
    columns = {"prompt": [f"row {i} " for i in range(3)], "chosen": ["a", "a", BAD], "rejected": ["b"] * 3}
    args = DPOConfig(str(tmp_path), **{**OPTIONS, "max_skipped_steps": 1, "per_device_train_batch_size": 3})
    trainer = DPOTrainer(
        broken_model(), args=args, train_dataset=Dataset.from_dict(columns), tokenizer=make_tokenizer()
    )
    with pytest.raises(NonFiniteError, match=r"whose loss is not finite: train_dataset\[2\] 'row 2 Z</s>'\."):
        trainer.train()


@pytest.mark.parametrize(
    ("size", "words"), [(7, r"train_dataset\[4\] '[^;]*', and 2 more"), (5, r"train_dataset\[4\] '[^;]*'")]
)
def test_a_model_that_is_broken_blames_no_single_row_for_long(tmp_path, size, words):
    """Every row is named, five of them with their text."""
    model = sane_model()
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    trainer = make(tmp_path, model=model, max_skipped_steps=1, per_device_train_batch_size=size)
    with pytest.raises(
        NonFiniteError, match=rf"in 1 step in a row.*train_dataset\[0\] .*{words}\. These steps did not change"
    ):
        trainer.train()


def test_no_limit(tmp_path):
    trainer = make(tmp_path, *range(8), max_skipped_steps=None)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, before)
    assert trainer.steps.skipped == 6


# ---- its parts, by hand ----


def test_a_finite_loss_and_its_gradient_stay_as_they_are():
    x = torch.tensor([3.0, -0.0, 1e38], requires_grad=True)
    assert torch.equal(propagate_nonfinite(x), x)
    propagate_nonfinite(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
    y = torch.tensor(2.0, requires_grad=True)
    propagate_nonfinite(y + math.inf).backward()
    assert y.grad.isnan()


def test_norms():
    assert [is_finite(x) for x in (None, 0.0, torch.tensor(5.0), math.inf, math.nan, -1.0)] == [True] * 3 + [False] * 3


class Quantised(torch.Tensor):
    """As torchao's: a tensor that does not know all functions."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.isfinite:
            raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs or {})


def test_quantised_weights_are_not_asked():
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(torch.ones(2, 2).as_subclass(Quantised), requires_grad=False)
    assert nonfinite_parameters(model) == []
    model.bias.data[0] = math.nan
    assert nonfinite_parameters(model) == ["bias"]


def test_counts():
    count = SkippedSteps()
    for skipped in (False, True, True, False):
        count.add(skipped=skipped)
    assert (count.skipped, count.in_a_row) == (2, 0)
    assert count.corrected({"loss": 1.0}) == {"loss": 2.0, "skipped_steps": 2}
    assert count.corrected({"loss": 1.0}) == {"loss": 1.0, "skipped_steps": 2}
    other = SkippedSteps()
    other.load_state_dict(count.state_dict())
    assert other == count


@pytest.mark.parametrize(("losses", "bad"), [([[1.0], [2.0], [math.nan], [3.0]], ["c"]), ([math.inf, 1.0], ["a"])])
def test_items_are_found_by_their_losses(losses, bad):
    """One each, or one for two neighbours; those of dummies belong to nobody."""
    batch = lay_out([Example([1], (Completion([2]),))] * 4)
    batch = replace(batch, weight=batch.mask)
    window = Window([list("abcd")], [batch, dummy_batch(batch)], torch.zeros(()), ({}, {}))
    assert items_with_bad_losses(window, lambda _: torch.tensor(losses)) == bad
    assert items_with_bad_gradients(window, lambda item, batch: torch.zeros(()), []) == [], "nothing here is trained"


def test_a_meter_goes_back():
    meter = Meter()
    meter.add({"x": torch.tensor([1.0]), "max_reward": torch.tensor([1.0])})
    mark = meter.mark()
    meter.add({"x": torch.tensor([5.0]), "y": torch.tensor([5.0]), "max_reward": torch.tensor([7.0])})
    meter.go_back(mark)
    assert meter.read(lambda row: row, torch.device("cpu")) == {"x": 1.0, "max_reward": 1.0}


def test_steps_on_triplets(tmp_path):
    """`PPOTrainer.step` leaves the weights alone where numbers overflow, and ends with the triplets named."""
    model = with_value_head(sane_model())
    config = PPOConfig(output_dir=str(tmp_path), batch_size=2, mini_batch_size=2, ppo_epochs=1, max_skipped_steps=2)
    trainer = PPOTrainer(config, model, None, make_tokenizer())
    triplets = [torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8, 9]), torch.tensor([10])]
    trainer.step(*triplets, [1.0, 2.0])
    before = model.v_head.summary.weight.detach().clone()
    found = trainer.step(*triplets, [3e38, -3e38])
    assert found["ppo/skipped_steps"] == 1
    assert torch.equal(model.v_head.summary.weight, before)
    with pytest.raises(
        NonFiniteError, match=r"in 2 optimizer steps in a row.*on the triplets (0, 1|1, 0) of this batch"
    ):
        trainer.step(*triplets, [3e38, -3e38])


def test_steps_on_triplets_lower_the_scale_of_float16_until_gradients_fit(tmp_path, monkeypatch):
    """As on a GPU with fp16=True: the gradient scaler skips a step itself, and has to be called for it."""
    config = PPOConfig(output_dir=str(tmp_path), batch_size=1, mini_batch_size=1, ppo_epochs=1)
    trainer = PPOTrainer(config, with_value_head(sane_model()), None, make_tokenizer())
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-20)
    accelerator.native_amp = True
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    head = trainer.model.v_head.summary.weight
    weights = [head.detach().clone()]
    for _ in range(4):
        found = trainer.step([torch.tensor([5, 6])], [torch.tensor([8, 9])], [1.0])
        weights.append(head.detach().clone())
    skipped = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert sum(skipped) == found["ppo/skipped_steps"]
    assert skipped[0]
    assert not skipped[-1]


def test_a_run_in_which_every_step_was_skipped_is_an_error(tmp_path):
    """Though it is too short for as many as end one; with max_skipped_steps=None any number is allowed."""
    trainer = make(tmp_path / "a", *range(8), max_steps=2)
    with pytest.raises(NonFiniteError, match=r"train_dataset\[1\]"):
        trainer.train()
    make(tmp_path / "b", *range(8), max_steps=2, max_skipped_steps=None).train()
    make(tmp_path / "c", 0, max_steps=2).train()


def test_a_loss_that_is_averaged_already_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"Averaged\.loss returned a loss of shape \[\].*\[1, \d+\]"):
        make(tmp_path, cls=Averaged, model=sane_model(), max_steps=1).train()
