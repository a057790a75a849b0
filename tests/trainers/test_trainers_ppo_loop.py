"""PPO as a whole loop: the same algorithm as `step`, rewards that rise, checkpoints that go on exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig

from tests.trainers.ppo_support import PROMPTS, assert_same, parameters, wanted
from trl.errors import ConfigError
from trl.models.value_heads.auto_models import AutoModelForCausalLMWithValueHead, with_value_head
from trl.rewards.call import RewardError
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer


def test_a_round_is_a_batch_gone_through_ppo_epochs_times():
    config = PPOConfig(batch_size=8, mini_batch_size=2, ppo_epochs=3)
    assert (config.per_device_train_batch_size, config.minibatches_per_rollout_batch, config.num_iterations) == (
        2,
        4,
        3,
    )
    assert (config.prompts_per_rollout_batch, config.num_generations) == (8, 1)
    other = PPOConfig(per_device_train_batch_size=2, steps_per_generation=4, num_iterations=3)
    assert (other.mini_batch_size, other.batch_size, other.ppo_epochs) == (2, 8, 3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_loop_runs_and_reports(make_loop, name):
    trainer = make_loop(name, head=False)
    before = parameters(trainer)
    trainer.train()
    first = trainer.state.log_history[0]
    for metric in ("reward", "kl", "kl_coef", "policy/approxkl", "policy/clipfrac", "val/error", "loss/value"):
        assert np.isfinite(first[metric]), metric
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    moved = [name for name, p in parameters(trainer).items() if not torch.equal(p, before[name])]
    assert "v_head.summary.weight" in moved
    assert len(moved) > len(before) / 2


def test_the_first_step_of_the_loop_is_a_step_on_its_samples(make_loop, make_model, tokenizer):
    """The loop's first optimizer step, and `step` on the same responses with the same rewards."""
    optimizers = []
    seen = {}

    def noted(prompts, completion_ids, **_):
        seen.update(prompts=prompts, ids=completion_ids, rewards=wanted(completion_ids))
        return seen["rewards"]

    def descent(model):
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1))
        return optimizers[-1]

    torch.manual_seed(3)
    one, other = (with_value_head(make_model("llama")) for _ in range(2))
    other.load_state_dict(one.state_dict())
    sizes = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1}
    options = {**sizes, "max_steps": 1, "lr_scheduler_type": "constant"}
    keywords = {"optimizers": (descent(one), None)}
    loop = make_loop(one, head=False, reward_funcs=noted, keywords=keywords, **options)
    loop.train()
    by_hand = PPOTrainer(PPOConfig(**sizes, bf16=False), other, None, tokenizer, optimizer=descent(other))
    queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in seen["prompts"]]
    by_hand.step(queries, [torch.tensor(ids) for ids in seen["ids"]], seen["rewards"])
    for name, value in parameters(by_hand).items():
        torch.testing.assert_close(parameters(loop)[name], value, rtol=1e-4, atol=1e-5)
    assert by_hand.algorithm.controller.coefficient == pytest.approx(loop.algorithm.controller.coefficient)


def test_the_reward_rises(make_loop):
    trainer = make_loop(
        batch_size=32, mini_batch_size=16, learning_rate=5e-3, init_kl_coef=0.05, ppo_epochs=4, max_steps=160,
        max_completion_length=8, lr_scheduler_type="constant", logging_steps=8,
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert np.mean(rewards[:2]) < 1
    assert np.mean(rewards[-3:]) > 4


def test_the_best_model_is_loaded_with_its_head(make_loop):
    trainer = make_loop(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="reward", keywords={"eval_dataset": PROMPTS.select(range(4))},
    )  # fmt: skip
    trainer.train()
    best = AutoModelForCausalLMWithValueHead.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(parameters(trainer), dict(best.named_parameters()), rtol=0, atol=0)
    assert Path(trainer.state.best_model_checkpoint).exists()


# ---- early stopping ----


def rounds_of(make_loop, **options):
    """How many rounds were sampled, in eight optimizer steps of rounds that are gone through four times."""
    rounds = []

    def counted(completion_ids, **_):
        rounds.append(len(completion_ids))
        return wanted(completion_ids)

    options = {"mini_batch_size": 8, "ppo_epochs": 4, "max_steps": 8, "early_stopping": True, **options}
    trainer = make_loop(reward_funcs=counted, **options)
    trainer.train()
    assert trainer.state.global_step == 8
    return rounds, trainer


def test_rounds_that_have_moved_too_far_end_early(make_loop):
    """After an epoch whose last step sees a KL above 1.5 target_kl, the next round begins; steps stay as planned."""
    assert rounds_of(make_loop, target_kl=1e6)[0] == [8, 8]
    rounds, trainer = rounds_of(make_loop, target_kl=-1e6)
    assert rounds == [8] * 8
    assert {entry["early_stop"] for entry in trainer.state.log_history if "early_stop" in entry} == {1.0}


def test_the_kl_that_ends_a_round_is_that_of_its_last_step(make_loop):
    """The policy that samples has not moved in a round's first step, so two steps are made where any move is too much."""
    kls = []
    _, trainer = rounds_of(make_loop, target_kl=1e6, learning_rate=5e-2)
    kls = [entry["policy/policykl"] for entry in trainer.state.log_history if "policy/policykl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-5)
    assert kls[1] > 0
    rounds, _ = rounds_of(make_loop, target_kl=kls[1] / 1.5 - 1e-4, learning_rate=5e-2)
    assert len(rounds) > 2


def test_a_loop_that_stops_rounds_early_resumes_exactly(make_loop, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "early_stopping": True, "target_kl": 1e-3, "max_steps": 9}
    options |= {"learning_rate": 2e-2, "ppo_epochs": 3}
    whole = make_loop(folder="whole", **options)
    whole.train()
    assert whole.buffer.position > whole.buffer.served
    again = make_loop(folder="again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(parameters(again), parameters(whole), rtol=0, atol=0)
    assert (again.buffer.position, again.buffer.served) == (whole.buffer.position, whole.buffer.served)


def test_evaluation_leaves_the_running_numbers_alone(make_loop):
    trainer = make_loop(use_score_scaling=True, keywords={"eval_dataset": PROMPTS.select(range(4))})
    found = trainer.evaluate()
    assert np.isfinite(found["eval_reward"])
    assert trainer.algorithm.moments.count == 0
    assert trainer.algorithm.controller.coefficient == 0.2


def test_adapters_only(make_loop):
    trainer = make_loop(head=False, max_steps=8, keywords={"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")})
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert_same(parameters(trainer), base, rtol=0, atol=0)
    assert abs([entry["kl"] for entry in trainer.state.log_history if "kl" in entry][-1]) > 1e-3


def test_the_full_penalty(make_loop):
    trainer = make_loop(kl_penalty="full", max_steps=6)
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-4)
    assert min(kls) > -1e-4


def test_several_rewards_are_weighed(make_loop):
    def firsts(completion_ids, **_):
        return [float(ids[0] % 2) for ids in completion_ids]

    trainer = make_loop(reward_funcs=[wanted, firsts], reward_weights=[1.0, 0.25], max_steps=2)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/firsts/mean"] > 0
    expected = first["rewards/wanted/mean"] + 0.25 * first["rewards/firsts/mean"]
    assert first["reward"] == pytest.approx(expected, abs=1e-5)


def test_samples_of_an_evaluation_are_kept(make_loop, tmp_path):
    rows = PROMPTS.select(range(4))
    trainer = make_loop(log_completions=True, num_completions_to_print=0, keywords={"eval_dataset": rows})
    found = trainer.evaluate()
    (file,) = (tmp_path / "out" / "completions" / "eval").glob("*.parquet")
    table = pq.read_table(file).to_pylist()
    assert [row["prompt"] for row in table] == rows["prompt"]
    assert np.mean([row["wanted"] for row in table]) == pytest.approx(found["eval_reward"])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completion_ids, **_: [1.0], "gave 1 reward for 8 samples: it has to give one each"),
        (lambda completion_ids, **_: [float("nan")] * 8, "gave nan .* Sample 1 of 8"),
        (lambda completion_ids, **_: [len(completion_ids) / 0] * 8, "raised ZeroDivisionError"),
    ],
)
def test_functions_that_give_no_rewards(make_loop, function, words):
    with pytest.raises(RewardError, match=f"Reward function '<lambda>' {words}"):
        make_loop(reward_funcs=function).train()


def test_a_function_that_does_not_apply(make_loop):
    def sometimes(completion_ids, **_):
        return [None if i % 2 else 1.0 for i in range(len(completion_ids))]

    trainer = make_loop(reward_funcs=sometimes)
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.state.log_history[0]["reward"] == 1.0


def test_loops_that_cannot_be(make_loop, make_model, tokenizer):
    by_hand = PPOTrainer(PPOConfig(batch_size=1), with_value_head(make_model("llama")), None, tokenizer)
    with pytest.raises(ConfigError, match=r"train\(\) needs reward_funcs and train_dataset.*call step\("):
        by_hand.train()
    with pytest.raises(ConfigError, match="reward_funcs and reward_model are two names"):
        make_loop(keywords={"reward_model": wanted})
    with pytest.raises(ConfigError, match="The first argument of PPOTrainer is its configuration"):
        PPOTrainer(make_model("llama"))
