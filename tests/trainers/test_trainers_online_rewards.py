"""What reward functions of online trainers are given, what is logged, and what configurations are refused."""

from __future__ import annotations

import asyncio

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.conftest import make_tokenizer
from tests.trainers.online_support import (
    Table,
    config,
    encoded,
    letters,
    make_trainer,
    prompts,
)
from trl.errors import ConfigError
from trl.rewards.call import RewardError
from trl.rewards.model import RewardModel
from trl.trainers.grpo import GRPOTrainer
from trl.trainers.rloo import RLOOConfig, RLOOTrainer

# ---- rewards ----


def test_columns_reach_reward_functions_by_name(make_model, tmp_path):
    given = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, **more):
        given.update(prompts=prompts, completions=completions, answer=answer, step=trainer_state.global_step, more=more)
        assert make_tokenizer().batch_decode(completion_ids, skip_special_tokens=True) == completions
        return [1.0] * len(prompts)

    rows = prompts(4, answer=["w", "x", "y", "z"])
    trainer = make_trainer(make_model("llama"), tmp_path, reward, rows, shuffle_dataset=False, engine=Table())
    trainer.train()
    assert given["prompts"] == [rows[0]["prompt"]] * 4 + [rows[1]["prompt"]] * 4
    assert given["answer"] == ["w"] * 4 + ["x"] * 4
    assert given["step"] == 0
    assert set(given["more"]) == {"log_metric", "log_extra"}


def test_reward_functions_log_columns_of_their_own(make_model, tmp_path):
    def reward(completions, log_extra, **_):
        log_extra("upper", [text.upper() for text in completions])
        return [0.0] * len(completions)

    make_trainer(make_model("llama"), tmp_path, reward, engine=Table(), log_completions=True).train()
    table = pq.read_table(tmp_path / "completions" / "completions_00001.parquet").to_pylist()
    assert [row["upper"] for row in table] == [row["completion"].upper() for row in table]


def test_conversations_give_conversations(make_model, tmp_path):
    def reward(prompts, completions, **_):
        assert prompts[0] == [{"role": "user", "content": "Hi 0"}]
        assert all(set(c[0]) == {"role", "content"} and c[0]["role"] == "assistant" for c in completions)
        return [float(len(c[0]["content"])) for c in completions]

    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"Hi {i}"}] for i in range(2)]})
    make_trainer(make_model("llama"), tmp_path, reward, rows, shuffle_dataset=False).train()


def test_rewards_are_weighed_and_logged_by_name(make_model, tmp_path):
    async def waits(completions, **_):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    def sometimes(completions, log_metric, **_):
        log_metric("asked", 3.0)
        return [None, 1.0] * (len(completions) // 2)

    trainer = make_trainer(make_model("llama"), tmp_path, [waits, sometimes], reward_weights=[1.0, 0.5], engine=Table())
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["rewards/waits/mean"], log["rewards/sometimes/mean"]) == (2.0, 1.0)
    assert log["reward"] == 2.25
    assert log["asked"] == 3.0
    assert log["frac_reward_zero_std"] == 0


@pytest.fixture
def classifier(tmp_path):
    """A folder with a reward model, and a tokenizer of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0}
    LlamaForSequenceClassification(LlamaConfig(**sizes)).save_pretrained(tmp_path / "judge")
    make_tokenizer().save_pretrained(tmp_path / "judge")
    return str(tmp_path / "judge")


def test_reward_models_by_name_and_as_objects(make_model, tmp_path, classifier):
    model = LlamaForSequenceClassification.from_pretrained(classifier)
    trainer = GRPOTrainer(
        make_model("llama"),
        [classifier, model],
        config(tmp_path / "run", reward_weights=[1.0, -1.0], log_completions=True),
        prompts(),
        processing_class=make_tokenizer(),
        reward_processing_classes=[None, make_tokenizer()],
        engine=Table(),
    )
    trainer.train()
    assert trainer.reward_funcs[1] is model
    log = trainer.state.log_history[0]
    assert log["rewards/judge/mean"] == pytest.approx(log["rewards/judge_2/mean"])
    assert log["rewards/judge/std"] > 0
    assert log["reward"] == pytest.approx(0, abs=1e-6)
    (row, *_) = pq.read_table(tmp_path / "run" / "completions" / "completions_00001.parquet").to_pylist()
    (expected,) = RewardModel(classifier)([row["prompt"]], [row["completion"]])
    assert row["judge"] == pytest.approx(expected, abs=1e-5)


def test_reward_functions_are_checked_before_training(make_model, tmp_path):
    def reward(completions, anwser):
        return [0.0] * len(completions)

    with pytest.raises(
        ConfigError, match="'reward' has the argument 'anwser', which is not a column .* Did you mean 'answer'"
    ):
        make_trainer(make_model("llama"), tmp_path, reward, prompts(4, answer=["1"] * 4))


def test_a_reward_that_fails_names_itself_and_the_sample(make_model, tmp_path):
    def fragile(completion_ids, **_):
        return [1 / (len(ids) - 7) for ids in completion_ids]

    trainer = make_trainer(make_model("llama"), tmp_path, fragile, engine=Table())
    with pytest.raises(RewardError, match=r"'fragile' raised ZeroDivisionError: division by zero. Sample \d of 8"):
        trainer.train()


def test_samples_whose_reward_failed_can_be_dropped(make_model, tmp_path):
    def fragile(completion_ids, **_):
        return [float("nan") if len(ids) > 4 else len(ids) for ids in completion_ids]

    lengths = [len(r) for rollouts in Table().generate(encoded(2), None, 4) for r in rollouts]
    trainer = make_trainer(
        make_model("llama"), tmp_path, fragile, engine=Table(), shuffle_dataset=False, on_reward_error="drop"
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["failed_rewards"] == pytest.approx(sum(n > 4 for n in lengths) / 8)
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 8)


def test_prompts_that_leave_little_room_are_said(make_model, tmp_path, caplog):
    make_trainer(make_model("gpt2", n_positions=24), tmp_path, letters, max_completion_length=8)
    assert (
        "prompts leave less than max_completion_length=8 of the model's context of 24 tokens, the longest"
        in caplog.text
    )


def test_rewards_that_never_differ_are_said(make_model, tmp_path, caplog):
    def constant(completions, **_):
        return [1.0] * len(completions)

    make_trainer(make_model("llama"), tmp_path, constant, engine=Table(), max_steps=6).train()
    assert caplog.text.count("had the same reward (constant), so nothing was learned") == 1


# ---- reference, adapters, evaluation, logs ----


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])], ids=["full", "adapter"])
def test_the_reference_is_the_model_that_was_given(make_model, tmp_path, peft):
    options = {"beta": 0.1, "max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    trainer = make_trainer(make_model("llama"), tmp_path, letters, peft=peft, **options)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history[:2]]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-4


def test_no_reference_without_a_penalty(make_model, tmp_path):
    assert make_trainer(make_model("llama"), tmp_path).reference is None
    assert make_trainer(make_model("llama"), tmp_path, cls=RLOOTrainer).reference is not None


def test_evaluation_samples_and_rewards(make_model, tmp_path):
    trainer = make_trainer(make_model("llama"), tmp_path, engine=Table(), num_generations_eval=2)
    trainer.eval_dataset = trainer.encode(prompts(3), "eval", "eval")
    metrics = trainer.evaluate()
    assert trainer.engine.calls == [(3, 2)]
    lengths = [len(r) for rollouts in Table().generate(encoded(3), None, 2) for r in rollouts]
    assert metrics["eval_reward"] == pytest.approx(sum(lengths) / 6)
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]


def test_an_engine_that_is_put_in_the_place_of_another_samples(make_model, tmp_path):
    first, second = Table(), Table()
    trainer = make_trainer(make_model("llama"), tmp_path, engine=first)
    trainer.engine = second
    trainer.train()
    assert not first.calls
    assert second.calls == [(2, 4)]


def test_completions_are_shown_and_kept(make_model, tmp_path, capsys):
    trainer = make_trainer(
        make_model("llama"), tmp_path, engine=Table(), log_completions=True, num_completions_to_print=2, max_steps=2
    )
    trainer.train()
    shown = capsys.readouterr().out
    assert "Step 1" in shown
    assert "advantage" in shown
    table = pq.read_table(tmp_path / "completions" / "completions_00002.parquet").to_pylist()
    assert len(table) == 8
    assert list(table[0]) == ["step", "prompt", "completion", "of_length", "advantage"]
    assert sum(row["advantage"] for row in table) == pytest.approx(0, abs=1e-4)


def test_options_of_sampling_reach_the_engine(make_model, tmp_path):
    engine = Table()
    options = {
        "temperature": 0.6,
        "top_k": 5,
        "min_p": 0.1,
        "generation_kwargs": {"stop": "\n", "no_repeat_ngram_size": 2},
    }
    make_trainer(make_model("llama"), tmp_path, engine=engine, max_steps=2, **options).train()
    params = engine.params
    assert (params.temperature, params.top_k, params.min_p, params.stop) == (0.6, 5, 0.1, ("\n",))
    assert params.max_new_tokens == 8
    assert params.generation_config.no_repeat_ngram_size == 2


# ---- configurations ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_generations": 3}, "A rollout batch has 8 completions per process .* no multiple of num_generations=3"),
        ({"num_generations": 1}, "a group needs at least 2 completions"),
        ({"loss_type": "grop"}, "Unknown loss_type 'grop'. Did you mean 'grpo'"),
        ({"generation_batch_size": 12}, "generation_batch_size=12 has to be per_device_train_batch_size"),
        ({"use_vllm": True, "vllm_mode": "sever"}, "Unknown vllm_mode 'sever'. Did you mean 'server'"),
        ({"zero_variance": "skip"}, "Unknown zero_variance 'skip'"),
        ({"scale_rewards": "groups"}, "Unknown scale_rewards 'groups'. Did you mean 'group'"),
        ({"loss_aggregation": "sequence"}, "contradicts loss_type='dapo', which averages by 'token': leave it out"),
        ({"ref_model_mixup_alpha": 0}, "ref_model_mixup_alpha=0: give more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: give a probability above 0 and up to 1"),
        ({"max_completion_length": 0}, "max_completion_length=0: give 1 or more"),
        ({"generation_kwargs": {"stopp": ["."]}}, "GenerationConfig has 'stopp'. Did you mean 'stop'"),
        ({"num_generation": 4}, "GRPOConfig has no option 'num_generation'. Did you mean 'num_generations'"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **options)


@pytest.mark.parametrize("bounds", [(1.0, -1.0), (1.0,)])
def test_bounds_of_rewards_are_two_in_order(tmp_path, bounds):
    with pytest.raises(ConfigError, match="reward_clip_range=.* give two numbers, the lowest reward and the highest"):
        RLOOConfig(output_dir=str(tmp_path), reward_clip_range=bounds)


def test_options_of_older_scripts(tmp_path):
    made = config(tmp_path, vllm_importance_sampling_cap=2.0, vllm_mode="server", scale_rewards=False)
    assert made.importance_sampling_clip_max == 2.0
    assert made.make_algorithm().scale == "none"
    older = RLOOConfig(output_dir=str(tmp_path), rloo_k=4, kl_coef=0.1)
    assert (older.num_generations, older.beta) == (4, 0.1)


def test_rewards_are_needed(make_model, tmp_path):
    with pytest.raises(ConfigError, match="reward_funcs is missing"):
        make_trainer(make_model("llama"), tmp_path, None)
    with pytest.raises(ConfigError, match="reward_weights has 2 values for 1 reward function:"):
        make_trainer(make_model("llama"), tmp_path, letters, reward_weights=[1.0, 2.0])
