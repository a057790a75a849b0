"""Online DPO: pairs of the best and the worst, ranked by rewards or a judge."""

from __future__ import annotations

import math

import pytest

from tests.trainers.online_support import (
    Table,
    assert_same,
    encoded,
    gradient,
    make_trainer,
)
from trl.errors import ConfigError, DataError
from trl.trainers.online_dpo import JudgeReward, OnlineDPOTrainer

# ---- online DPO ----


def test_online_dpo_learns_from_the_best_and_the_worst(make_model, tmp_path):
    options = {"num_generations": 4, "per_device_train_batch_size": 2, "loss_type": "sigmoid", "max_steps": 2}
    trainer = make_trainer(
        make_model("llama"), tmp_path, cls=OnlineDPOTrainer, engine=Table(), shuffle_dataset=False, **options
    )
    trainer.train()
    groups = Table().generate(encoded(4)[2:], None, 4)
    pairs = [[len(c) for c in example.completions] for example in trainer.buffer.batch[0]]
    assert pairs == [[max(map(len, g)), min(map(len, g))] for g in groups]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert trainer.state.log_history[0]["pairs"] == 1


def test_online_dpo_splits_have_the_same_gradient(make_model, tmp_path):
    whole = {"cls": OnlineDPOTrainer, "num_generations": 2, "per_device_train_batch_size": 8}
    expected = gradient(make_model("llama"), tmp_path, **whole)
    splits = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(gradient(make_model("llama"), tmp_path, **{**whole, **splits}), expected)


def test_a_judge_ranks(make_model, tmp_path):
    def judge(prompts, completions):
        return [-1 if i else max(range(2), key=lambda k: len(group[k])) for i, group in enumerate(completions)]

    options = {"num_generations": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(
        make_model("llama"), tmp_path, None, cls=OnlineDPOTrainer, engine=Table(), judge=judge, **options
    )
    trainer.train()
    assert trainer.state.log_history[0]["pairs"] == 0.5
    assert trainer.state.log_history[0]["rewards/judge/mean"] == 0.5


def test_a_judge_is_a_function(make_model):
    with pytest.raises(ConfigError, match="judge is a str: give a function"):
        OnlineDPOTrainer(make_model("llama"), judge="pair_rm")


@pytest.mark.parametrize("winner", [2, -2, 0.5, None])
def test_a_judge_names_a_completion_that_there_is(winner):
    with pytest.raises(DataError, match=f"judge returned {winner} for a prompt with 2 completions: .* 0 to 1, or -1"):
        JudgeReward(lambda prompts, completions: [winner])(prompts=["p"] * 2, completions=["a", "b"])
