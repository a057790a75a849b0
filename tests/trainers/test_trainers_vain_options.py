"""Options that trainers do not read, or that would break a promise, are refused or said; others do what they say."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from tests.trainers.online_support import make_trainer
from trl import (
    DiffusionGRPOConfig,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.errors import ConfigError

TEXTS = Dataset.from_dict({"text": ["A fox.", "It runs far.", "No.", "It is late now."]})
PAIRS = Dataset.from_dict(
    {"prompt": ["Why", "How is it"] * 2, "chosen": [" so", " it is"] * 2, "rejected": [" no"] * 4}
)
CPU = {"use_cpu": True, "report_to": "none"}
SHORT = {**CPU, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "html_report": False}


def trainer_of(model, tokenizer, folder, rows=TEXTS, *, evaluated=None, **options):
    args = SFTConfig(str(folder), **{**SHORT, "per_device_train_batch_size": 2, **options})
    return SFTTrainer(model, args, train_dataset=rows, eval_dataset=evaluated, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval_steps": 5}, "eval_steps=5 has no effect without eval_strategy='steps'"),
        ({"eval_delay": 5}, "eval_delay=5 has no effect without eval_strategy"),
        ({"save_total_limit": 5, "save_strategy": "no"}, "save_total_limit=5 has no effect without a save_strategy"),
        ({"greater_is_better": True}, "greater_is_better=True has no effect without metric_for_best_model"),
        ({"optim_target_modules": ["q_proj"]}, "has no effect without an optim of GaLore"),
        ({"adam_beta1": 0.5, "optim": "sgd"}, "adam_beta1=0.5 has no effect without an optim of Adam's family"),
        ({"eval_steps": 5, "eval_strategy": "steps"}, ""),
        ({"adam_beta1": 0.5}, ""),
    ],
)
def test_options_of_transformers_without_another(options, words, tmp_path, caplog):
    SFTConfig(str(tmp_path), **CPU, **options)
    assert words in caplog.text
    assert words or "has no effect" not in caplog.text


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (DPOConfig, {"cpo_alpha": 0.5}, "cpo_alpha=0.5 has no effect without loss_type='cpo'"),
        (DPOConfig, {"cpo_alpha": 0.5, "loss_type": "cpo", "reference_free": True}, ""),
        (
            GRPOConfig,
            {"vllm_structured_outputs_regex": "a+"},
            "vllm_structured_outputs_regex='a+' has no effect without",
        ),
    ],
)
def test_options_of_another_loss_or_engine(config, options, words, tmp_path, caplog):
    config(str(tmp_path), **CPU, **options)
    assert words in caplog.text
    assert words or "has no effect" not in caplog.text


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (SFTConfig, {"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True .*exit_on_signal"),
        (OnlineDPOConfig, {"recompute_old_logprobs": True}, "recompute_old_logprobs=True"),
        (
            DiffusionGRPOConfig,
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy='sequential' has no effect",
        ),
    ],
)
def test_what_would_break_a_promise_is_refused(config, options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        config(str(tmp_path), **CPU, **options)


@pytest.mark.parametrize(
    ("config", "name", "value", "words"),
    [
        (SFTConfig, "average_tokens_across_devices", False, "tokens of all processes"),
        (DiffusionGRPOConfig, "auto_find_batch_size", True, "max_steps_per_micro_batch"),
        (GRPOConfig, "auto_find_batch_size", True, "max_tokens_per_micro_batch"),
    ],
)
def test_options_for_which_there_is_no_need_are_ignored(config, name, value, words, tmp_path, caplog):
    made = config(str(tmp_path), **CPU, **{name: value})
    assert getattr(made, name) is not value
    assert caplog.text.count(f"{name}={value} has no effect") == 1
    assert words in caplog.text


def test_no_tracker_may_be_none(tmp_path):
    assert SFTConfig(str(tmp_path), use_cpu=True, report_to=None).report_to == []


def test_an_evaluation_does_not_round_what_is_trained(make_model, tokenizer, tmp_path, caplog):
    trained = trainer_of(make_model("llama"), tokenizer, tmp_path, evaluated=TEXTS, bf16_full_eval=True)
    trained.evaluate()
    assert trained.model.dtype == torch.float32
    assert "bf16_full_eval=True has no effect" in caplog.text
    found = trainer_of(make_model("llama"), tokenizer, tmp_path, None, evaluated=TEXTS, bf16_full_eval=True)
    assert math.isfinite(found.evaluate()["eval_loss"])


def test_evaluations_change_no_random_number_of_training(make_model, tokenizer, tmp_path):
    weights = []
    for strategy in ("no", "steps"):
        model = make_model("llama", attention_dropout=0.5)
        options = {"eval_strategy": strategy, "eval_steps": 1} if strategy == "steps" else {}
        trainer_of(model, tokenizer, tmp_path / strategy, evaluated=TEXTS, learning_rate=0.1, **options).train()
        weights.append(model.lm_head.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_an_optimizer_that_keeps_its_rate_is_said(make_model, tokenizer, tmp_path, caplog):
    trainer = trainer_of(make_model("llama"), tokenizer, tmp_path, learning_rate=0.1)
    trainer.train()
    assert "the optimizer keeps" not in caplog.text
    trainer.args.learning_rate = 0.2
    trainer.train()
    assert "learning_rate was 0.1, and is 0.2 now, which has no effect" in caplog.text
    trainer.optimizer = None
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.2


def test_the_option_to_resume_is_read_by_train(make_model, tokenizer, tmp_path):
    trainer_of(make_model("llama"), tokenizer, tmp_path, save_strategy="steps", save_steps=1).train()
    options = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1"), "save_strategy": "steps", "save_steps": 1}
    resumed = trainer_of(make_model("llama"), tokenizer, tmp_path, **options)
    resumed.train()
    assert [log["step"] for log in resumed.state.log_history if "loss" in log] == [1, 2]
    assert resumed._globalstep_last_logged == 2
    before = resumed.state.log_history[0]["loss"]
    resumed.train()
    assert resumed.state.log_history[0]["loss"] != before  # of a first step on trained weights, not of the checkpoint
    options["resume_from_checkpoint"] = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="resume_from_checkpoint=.*nowhere"):
        trainer_of(make_model("llama"), tokenizer, tmp_path, **options).train()


def test_underflow_is_looked_for(make_model, tokenizer, tmp_path):
    trainer_of(make_model("llama"), tokenizer, tmp_path, debug="underflow_overflow").train()


def test_a_chat_template_that_is_nowhere(make_model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="chat_template_path='/no/where' is no .jinja file"):
        trainer_of(make_model("llama"), tokenizer, tmp_path, chat_template_path="/no/where")


def test_noise_of_neftune_is_that_of_one_sequence(make_model, tokenizer, tmp_path):
    """Noise of α/√(Td) for T positions: not those of a row of several sequences, as shared prompts would make them."""
    args = {**SHORT, "per_device_train_batch_size": 4, "max_steps": 1}
    options = DPOConfig(str(tmp_path), **args, neftune_noise_alpha=5.0)
    assert (
        DPOTrainer(make_model("llama"), args=options, train_dataset=PAIRS, processing_class=tokenizer).layout
        == "padded"
    )
    options = DPOConfig(str(tmp_path), **args)
    assert (
        DPOTrainer(make_model("llama"), args=options, train_dataset=PAIRS, processing_class=tokenizer).layout
        == "shared"
    )
    assert make_trainer(make_model("llama"), tmp_path, neftune_noise_alpha=5.0).layout == "padded"


def test_samples_of_evaluations_in_a_second_call_of_train(make_model, tokenizer, tmp_path):
    options = {"eval_strategy": "epoch", "eval_samples": 1, "eval_samples_max_new_tokens": 2, "max_steps": -1}
    trainer = trainer_of(make_model("llama"), tokenizer, tmp_path, evaluated=TEXTS, num_train_epochs=1, **options)
    for _ in range(2):
        trainer.train()
        (found,) = (tmp_path / "completions").iterdir()
        found.unlink()


def test_two_ways_to_rank_completions(make_model, tmp_path):
    with pytest.raises(ConfigError, match="reward_model_path='/no/where' and reward_funcs .* give one"):
        make_trainer(
            make_model("llama"), tmp_path, cls=OnlineDPOTrainer, num_generations=2, reward_model_path="/no/where"
        )
