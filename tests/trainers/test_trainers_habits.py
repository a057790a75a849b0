"""What scripts written for TRL 1.16 rely on, beside names and arguments."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.optim import SGD
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    trainer_pt_utils,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from tests.conftest import SPECIAL, WIDTHS, make_tokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    clone_chat_template,
)
from trl.errors import ConfigError, ModelError
from trl.rewards import accuracy_reward
from trl.training.gradients import GradientCheck
from trl.training.optimizers import check_optimizer, warn_of_rounded_steps

TEXTS = Dataset.from_dict({"text": ["A fox.", "It runs far."] * 4})
PAIRS = Dataset.from_dict({"prompt": ["Why"] * 4, "chosen": [" so", " it"] * 2, "rejected": [" no"] * 4})
LABELLED = Dataset.from_dict({"prompt": ["Why"] * 4, "completion": [" so"] * 4, "label": [True, False] * 2})
PROMPTS = Dataset.from_dict({"prompt": ["Why", "How"] * 4})

HAS_BALANCE = pytest.mark.skipif(
    not hasattr(trainer_pt_utils, "BatchRebalanceSampler"), reason="this release of transformers has no such strategy"
)


def options(folder, **kw):
    shown = {
        "save_strategy": "no",
        "disable_tqdm": True,
        "html_report": False,
        "report_to": [],
        "max_steps": 1,
        "bf16": False,
    }
    return {"output_dir": str(folder), "per_device_train_batch_size": 2, "logging_steps": 1, **shown, **kw}


def classifier(**kw):
    return LlamaForSequenceClassification(LlamaConfig(**WIDTHS, num_labels=1, **kw)).eval()


def sft(model, folder, **kw):
    args = SFTConfig(**options(folder, **kw))
    return SFTTrainer(model, args, train_dataset=TEXTS, processing_class=make_tokenizer())


def grpo(model, folder, *functions, **kw):
    sampled = {"num_generations": 2, "max_completion_length": 3, **kw}
    args = GRPOConfig(**options(folder, **sampled))
    return GRPOTrainer(model, list(functions), args, PROMPTS, processing_class=make_tokenizer())


def constant(value, name):
    def reward(completions, **_):
        return [value] * len(completions)

    reward.__name__ = name
    return reward


def test_the_last_step_is_logged_whatever_logging_steps_is(make_model, tmp_path):
    trainer = sft(make_model("llama"), tmp_path, logging_steps=2, max_steps=3)
    trainer.train()
    first, last, run = trainer.state.log_history
    assert [first["step"], last["step"], run["step"]] == [2, 3, 3]
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "step_time"} <= last.keys()
    assert (2 * first["loss"] + last["loss"]) / 3 == pytest.approx(run["train_loss"])


def test_without_logs_the_end_has_what_was_measured(make_model, tmp_path):
    trainer = sft(make_model("llama"), tmp_path, logging_strategy="no", max_steps=3)
    trainer.train()
    (run,) = trainer.state.log_history
    assert {"train_loss", "entropy", "mean_token_accuracy", "num_tokens", "step_time"} <= run.keys()


def test_a_run_that_ends_with_a_log_measures_nothing_twice(make_model, tmp_path):
    trainer = sft(make_model("llama"), tmp_path)
    trainer.train()
    assert "entropy" in trainer.state.log_history[0]
    assert "entropy" not in trainer.state.log_history[-1]


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer, KTOTrainer])
def test_nothing_to_train_on_is_an_error(make_model, tmp_path, trainer):
    args = trainer.config_class(**options(tmp_path))
    with pytest.raises(ConfigError, match=f"train_dataset is missing: {trainer.__name__}"):
        trainer(make_model("llama"), args=args, processing_class=make_tokenizer()).train()


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "shape", "labels"),
    [
        (DPOTrainer, DPOConfig, PAIRS, (4, 2), [0, 0, 0, 0]),
        (KTOTrainer, KTOConfig, LABELLED, (4,), [0, 0, 1, 1]),
        (RewardTrainer, RewardConfig, PAIRS, (4, 2), [0, 0, 0, 0]),
    ],
)
def test_metrics_of_a_user_are_given_rewards(make_model, tmp_path, trainer, config, rows, shape, labels):
    seen = []

    def measure(found):
        seen.append(found)
        return {"own": 2.0}

    model = classifier() if trainer is RewardTrainer else make_model("llama")
    args = config(**options(tmp_path, per_device_eval_batch_size=4))
    made = trainer(model, args=args, eval_dataset=rows, processing_class=make_tokenizer(), compute_metrics=measure)
    metrics = made.evaluate()
    assert metrics["eval_own"] == 2.0
    assert seen[0].predictions.shape == shape
    assert sorted(seen[0].label_ids.tolist()) == labels
    if trainer is RewardTrainer:
        accuracy = (seen[0].predictions[:, 0] > seen[0].predictions[:, 1]).mean()
        assert metrics["eval_accuracy"] == pytest.approx(accuracy)


def test_the_reward_that_is_logged_is_the_weighted_sum(make_model, tmp_path):
    aggregation = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]}
    trainer = grpo(make_model("llama"), tmp_path, constant(1.0, "one"), constant(2.0, "two"), **aggregation)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(1.0 + 0.5 * 2.0)


def test_completions_without_a_reward_are_said_once(make_model, tmp_path, caplog):
    trainer = grpo(make_model("llama"), tmp_path, constant(None, "picky"), max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("got no reward: picky returned None") == 1


def test_one_tokenizer_is_not_taken_for_two_reward_models(make_model, tmp_path):
    args = GRPOConfig(**options(tmp_path, num_generations=2))
    models = [classifier(), classifier()]
    with pytest.raises(ConfigError, match="reward_processing_classes is one tokenizer, but there are 2 reward models"):
        GRPOTrainer(
            make_model("llama"),
            models,
            args,
            PROMPTS,
            processing_class=make_tokenizer(),
            reward_processing_classes=make_tokenizer(),
        )


@pytest.mark.parametrize("solution", ["see the picture above", "It is not known.", "  "])
def test_answers_that_cannot_be_read_give_no_reward(solution):
    assert accuracy_reward([r"\boxed{4}", r"\boxed{Paris}"], [solution, "Paris"]) == [None, 1.0]


def test_a_ratio_of_sequences_averaged_over_tokens_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        GRPOConfig(**options(tmp_path, num_generations=2, importance_sampling_level="sequence", loss_type="grpo"))
        assert not caplog.text
        GRPOConfig(**options(tmp_path, num_generations=2, importance_sampling_level="sequence")).make_algorithm()
    assert "importance_sampling_level='sequence'" in caplog.text


def test_kto_learns_from_one_kind_of_label_with_a_warning(make_model, tmp_path, caplog):
    rows = LABELLED.filter(lambda row: row["label"])
    with caplog.at_level(logging.WARNING):
        args = KTOConfig(**options(tmp_path))
        KTOTrainer(make_model("llama"), args=args, train_dataset=rows, processing_class=make_tokenizer()).train()
    assert "Of 2 completions, all have the label True" in caplog.text


def test_a_reference_has_its_name_in_online_dpo(make_model, tmp_path):
    args = OnlineDPOConfig(**options(tmp_path, max_completion_length=3))
    given = {"reward_funcs": constant(1.0, "one"), "args": args, "train_dataset": PROMPTS}
    reference = make_model("llama", seed=1)
    trainer = OnlineDPOTrainer(make_model("llama"), ref_model=reference, processing_class=make_tokenizer(), **given)
    assert trainer.reference.model is reference
    with pytest.raises(ConfigError, match="ref_model and reference"):
        OnlineDPOTrainer(make_model("llama"), ref_model=reference, reference=reference, **given)


def test_ppo_takes_token_ids_and_models_as_they_were_given(make_model, tmp_path):
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in ("Why not", "How")]
    trainer = PPOTrainer(
        args=PPOConfig(**options(tmp_path, response_length=3, num_ppo_epochs=1)),
        processing_class=tokenizer,
        model=make_model("llama"),
        ref_model=make_model("llama", seed=1),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=Dataset.from_dict({"input_ids": ids * 2}),
    )
    assert list(trainer.train_dataset[0]["prompt_ids"]) == ids[0]
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_cloned_template_leaves_no_id_without_a_token(make_model):
    tokenizer, source = make_tokenizer(), make_tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    model, tokenizer, added = clone_chat_template(make_model("llama", vocab_size=len(tokenizer)), tokenizer, source)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.convert_ids_to_tokens(added) == ["<|turn|>", "<|end|>"]


def test_a_classifier_takes_a_template(tmp_path):
    source = make_tokenizer()
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    source.save_pretrained(tmp_path / "chat")
    config = GPTNeoXConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=1,
        **SPECIAL,
    )
    args = RewardConfig(**options(tmp_path, chat_template_path=str(tmp_path / "chat")))
    model = GPTNeoXForSequenceClassification(config)
    trainer = RewardTrainer(model, args, train_dataset=PAIRS, processing_class=make_tokenizer())
    assert trainer.model.config.eos_token_id == source.eos_token_id


def test_models_are_tagged_for_the_hub(make_model, tmp_path):
    assert sft(make_model("llama"), tmp_path).model.model_tags == ["trl", "sft"]


@pytest.mark.parametrize(("trainer", "rows"), [(DPOTrainer, PAIRS), (KTOTrainer, LABELLED)])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_are_means_over_tokens_and_vocabulary(make_model, tmp_path, trainer, rows, name):
    """Gemma 2 caps them. The chosen completions " so" and " it", and the end, each have 4 tokens."""
    model, tokenizer = make_model(name), make_tokenizer()
    made = trainer(model, args=trainer.config_class(**options(tmp_path)), eval_dataset=rows, processing_class=tokenizer)
    found = made.evaluate()
    texts = {
        "chosen": [" so", " it"] if trainer is DPOTrainer else [" so"],
        "rejected": [" no" if trainer is DPOTrainer else " so"],
    }
    for side, completions in texts.items():
        ids = torch.tensor([tokenizer("Why" + text)["input_ids"] + [tokenizer.eos_token_id] for text in completions])
        ids = ids.to(model.device)
        with torch.no_grad():
            logits = model(ids).logits[:, -5:-1]
        assert found[f"eval_logits/{side}"] == pytest.approx(logits.mean().item(), rel=1e-4)
        if (trainer, side) == (DPOTrainer, "chosen"):
            right = (logits.argmax(-1) == ids[:, -4:]).float().mean().item()
            assert found["eval_mean_token_accuracy"] == pytest.approx(right)


def test_the_loss_without_the_entropy_bonus_is_logged(make_model, tmp_path):
    """Of equal rewards nothing is learned: what is left of the loss is the bonus."""
    trainer = grpo(make_model("llama"), tmp_path, constant(1.0, "one"), entropy_coef=0.5, max_completion_length=4)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["policy_loss"] == pytest.approx(0, abs=1e-6)
    assert log["loss"] == pytest.approx(-0.5 * log["entropy"], rel=1e-4)


@pytest.mark.parametrize(
    ("config", "given", "named"),
    [
        (DPOConfig, {"label_smoothing_factor": 0.1}, "label_smoothing_factor.*or set label_smoothing"),
        (SFTConfig, {"include_for_metrics": ["inputs"]}, "include_for_metrics"),
        (GRPOConfig, {"train_sampling_strategy": "group_by_length", "num_generations": 2}, "train_sampling_strategy"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, config, given, named):
    with pytest.raises(ConfigError, match=named):
        config(**options(tmp_path, **given))


def test_rows_that_another_release_encoded_are_the_same_rows(make_model, tmp_path):
    tokenizer = make_tokenizer()
    prompt, end = tokenizer("Why")["input_ids"], [tokenizer.eos_token_id]
    answers = {side: [tokenizer(text)["input_ids"] + end for text in PAIRS[side]] for side in ("chosen", "rejected")}
    encoded = Dataset.from_dict({"prompt_ids": [prompt] * 4, **{f"{side}_ids": ids for side, ids in answers.items()}})
    given = {"args": DPOConfig(**options(tmp_path)), "processing_class": tokenizer}
    found = [DPOTrainer(make_model("llama"), train_dataset=rows, **given).train_dataset for rows in (encoded, PAIRS)]
    assert found[0].column_names == ["prompt_ids", "completion_ids"]
    assert found[0].to_dict() == found[1].to_dict()


def test_a_search_for_hyperparameters_leads_to_sweeps(make_model, tmp_path):
    trainer = sft(make_model("llama"), tmp_path)
    with pytest.raises(ConfigError, match="trl sweep"):
        trainer.hyperparameter_search(n_trials=2)
    trainer.model_init = lambda: make_model("llama")
    with pytest.raises(ConfigError, match="model_init.*trl sweep"):
        trainer.train()
    with pytest.raises(ConfigError, match="model_init.*trl sweep"):
        SFTTrainer(None, model_init=lambda: make_model("llama"), train_dataset=TEXTS)


def test_rows_of_like_length_are_batched_together_where_that_is_asked_for(make_model, tmp_path):
    trainer = sft(make_model("llama"), tmp_path, train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, LengthGroupedSampler)
    assert sampler.lengths == [7, 13] * 4
    assert len(list(trainer.get_train_dataloader())) == 4
    assert list(sampler) == list(trainer._get_train_sampler())  # on every process, whatever else was drawn
    assert "eval_loss" in trainer.evaluate(TEXTS)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("strategy", ["group_by_length", pytest.param("batch_rebalance", marks=HAS_BALANCE)])
def test_a_strategy_by_length_orders_every_row_once_by_seed_and_epoch(make_model, tmp_path, strategy, packing):
    def orders(seed, epoch):
        trainer = sft(
            make_model("llama"), tmp_path, train_sampling_strategy=strategy, packing=packing, max_length=13, seed=seed
        )
        trainer.state.epoch = epoch
        rows, sampler = len(trainer.train_dataset), trainer._get_train_sampler()
        drawn = [i for i in sampler for i in (i if isinstance(i, list) else [i])]
        assert sorted(drawn) == list(range(rows))
        return drawn

    first = orders(0, 0.0)
    assert first == orders(0, 0.0)
    assert first not in (orders(1, 0.0), orders(0, 1.0))


def test_balancing_by_length_needs_a_release_that_has_it(make_model, tmp_path, monkeypatch):
    monkeypatch.delattr(trainer_pt_utils, "BatchRebalanceSampler", raising=False)
    trainer = sft(make_model("llama"), tmp_path, train_sampling_strategy="batch_rebalance")
    with pytest.raises(ConfigError, match="batch_rebalance.*newer release of transformers"):
        trainer.train()


# ---- gradients ----


class Broken(torch.nn.Module):
    """A layer that passes no gradient on to what is below it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs).detach().requires_grad_()


@pytest.mark.parametrize("trainer", [SFTTrainer, RewardTrainer])
def test_what_begins_at_random_is_a_function_of_the_seed(make_model, tmp_path, trainer):
    """An adapter, a head: whatever was drawn before, so that runs repeat, and processes begin alike."""
    make_model("llama").save_pretrained(tmp_path)
    adapter = {"peft_config": LoraConfig(r=2)} if trainer is SFTTrainer else {}
    rows = TEXTS if trainer is SFTTrainer else PAIRS
    made = []
    for seed, before in ((7, 1), (7, 2), (8, 2)):
        torch.manual_seed(before)
        config = trainer.config_class(str(tmp_path / "run"), seed=seed, report_to="none")
        model = trainer(str(tmp_path), config, train_dataset=rows, tokenizer=make_tokenizer(), **adapter).model
        made.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    one, same, other = made
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_parameter_without_a_gradient_is_named(make_model, tmp_path, caplog):
    model = make_model("llama")
    model.model.layers[1].input_layernorm = Broken(model.model.layers[1].input_layernorm)
    model.lm_head.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        sft(model, tmp_path, gradient_checkpointing=False).train()
    assert "got no gradient in the first backward pass" in caplog.text
    assert "layers.1.input_layernorm.layer.weight" in caplog.text
    assert "lm_head" not in caplog.text, "which is not trained"


def test_an_adapter_without_a_gradient_is_an_error():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    check = GradientCheck(model)
    model["head"](model["lora_A"](torch.ones(2)).detach()).sum().backward()
    with pytest.raises(ModelError, match=r"2 trained parameters got no gradient .*: lora_A\.weight, lora_A\.bias"):
        check.finish(model)


def test_gradients_that_lie_elsewhere_are_not_missed():
    """DeepSpeed takes them away before anybody sees them."""
    model = torch.nn.Linear(2, 2)
    check = GradientCheck(model)
    model(torch.ones(2)).sum().backward()
    model.zero_grad()
    check.finish(model)


def test_what_nothing_called_needs_no_gradient(caplog):
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    check = GradientCheck(model)
    with torch.no_grad():
        model["idle"](torch.ones(2))
    model["used"](torch.ones(2)).sum().backward()
    check.finish(model)
    assert not caplog.text


@pytest.mark.parametrize(("name", "folder"), [("org/Tiny-0.1B", "Tiny-0.1B-SFT"), ("", "trainer_output")])
def test_a_run_without_options_has_a_folder_of_its_own(make_model, tokenizer, name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model("llama")
    model.config._name_or_path = name
    rows = Dataset.from_dict({"text": ["A fox."]})
    assert SFTTrainer(model, train_dataset=rows, processing_class=tokenizer).args.output_dir == folder


# ---- steps that would change nothing ----


def test_an_optimizer_of_another_model_is_refused(caplog):
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    with pytest.raises(ConfigError, match="has none of the 2 trained parameters"):
        check_optimizer(SGD(other.parameters(), lr=0.1), model)
    check_optimizer(SGD([model.bias], lr=0.1), model)
    assert (
        "1 of 2 trained parameters are not in the optimizer that was passed, so they never change: weight"
        in caplog.text
    )
    caplog.clear()
    model.weight.requires_grad_(False)
    check_optimizer(SGD([model.bias], lr=0.1), model)
    assert caplog.text == ""


def test_weights_that_round_small_steps_away_are_said(caplog):
    warn_of_rounded_steps(nn.Linear(2, 3), 1e-6)
    assert caplog.text == ""
    warn_of_rounded_steps(nn.Linear(2, 3).bfloat16(), 1e-6)
    assert "9 trained parameters are in bfloat16: updates smaller than 1/256" in caplog.text


# ---- what is given in the wrong place ----


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"args": DPOConfig("x")}, "args is a DPOConfig, of another method: SFTTrainer takes SFTConfig"),
        ({"args": {"output_dir": "x"}}, r"args is a dict: SFTTrainer takes SFTConfig\(\*\*args\)"),
        ({"model": None}, "model is a NoneType: give a model, its folder, or its hub name"),
    ],
)
def test_arguments_of_another_kind_are_named(given, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        SFTTrainer(
            **{"model": nn.Linear(2, 2), "args": SFTConfig(**options(tmp_path)), "train_dataset": TEXTS, **given}
        )
