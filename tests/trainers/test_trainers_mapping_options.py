"""Options that are mappings: entries and values that are wrong are told with the option's name."""

from __future__ import annotations

import re

import pytest
from datasets import Dataset
from transformers import SchedulerType

from trl import DPOConfig, DPOTrainer, GRPOConfig, PPOConfig, SFTConfig, SFTTrainer
from trl.errors import ConfigError, MissingPackageError

CPU = {"use_cpu": True, "report_to": "none", "html_report": False}
TEXTS = Dataset.from_dict({"text": ["A fox."]})
PAIRS = Dataset.from_dict({"prompt": ["Why"], "chosen": [" so"], "rejected": [" no"]})
MAPPINGS = [(each, name) for each in (SFTConfig, DPOConfig, GRPOConfig, PPOConfig) for name in each._VALID_DICT_FIELDS]
OF_ONE = [(each, name) for each, name in MAPPINGS if each is SFTConfig or name not in SFTConfig._VALID_DICT_FIELDS]


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("value", [3, [1], "nope", "[1]"])
@pytest.mark.parametrize(("config", "name"), OF_ONE)
def test_other_values_than_mappings(config, name, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}={re.escape(repr(value))}: "):
        config(output_dir=str(tmp_path), **CPU, **{name: value})


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (SFTConfig, {"accelerator_config": {"split_batch": True}}, "'split_batch'. Did you mean 'split_batches'"),
        (SFTConfig, {"accelerator_config": '{"split_batch": true}'}, "'split_batch'. Did you mean 'split_batches'"),
        (SFTConfig, {"gradient_checkpointing_kwargs": {"use_reentrent": 1}}, "Did you mean 'use_reentrant'"),
        (SFTConfig, {"dataset_kwargs": {"skip_prepare": True}}, "'skip_prepare'. Did you mean 'skip_prepare_dataset'"),
        (
            SFTConfig,
            {"lr_scheduler_kwargs": {"num_cycle": 2}, "lr_scheduler_type": "cosine"},
            "Did you mean 'num_cycles'",
        ),
        (SFTConfig, {"lr_scheduler_kwargs": {"num_cycles": "x"}, "lr_scheduler_type": "cosine"}, "'num_cycles': 'x'"),
        (SFTConfig, {"optim_args": "beta3=1", "optim": "adamw_torch"}, "optim='adamw_torch' does not read 'beta3'"),
        (SFTConfig, {"optim_args": "momentm=1", "optim": "sgd"}, "'momentm'. Did you mean 'momentum'"),
        (SFTConfig, {"optim_args": "momentum=1,2", "optim": "sgd"}, "'2' is not name=value"),
        (SFTConfig, {"optim_args": {"momentum": 1}}, "'name=value'"),
        (SFTConfig, {"parallelism_config": {"tp_size": 1}}, "parallelism_config={'tp_size': 1}"),
        (
            PPOConfig,
            {"accelerator_kwargs": '{"cpus": 1}'},
            "accelerator_kwargs has no entry 'cpus'. Did you mean 'cpu'",
        ),
        (
            PPOConfig,
            {"project_kwargs": {"loging_dir": "x"}},
            "project_kwargs .* 'loging_dir'. Did you mean 'logging_dir'",
        ),
        (PPOConfig, {"tracker_kwargs": {"wandbb": {}}, "log_with": "wandb"}, "'wandbb'. Did you mean 'wandb'"),
        (GRPOConfig, {"generation_kwargs": {"top_kk": 3}}, "generation_kwargs: .* 'top_kk'. Did you mean 'top_k'"),
        (GRPOConfig, {"generation_kwargs": {"temperature": "hot"}}, "temperature='hot' is text"),
        (GRPOConfig, {"generation_kwargs": {"top_k": 2.5}}, "top_k=2.5: give an int"),
        (SFTConfig, {"max_steps": 2.5}, "max_steps=2.5: give an int"),
    ],
)
def test_wrong_entries(config, options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        config(output_dir=str(tmp_path), **CPU, **options)


NEEDY = {
    "cosine_with_min_lr": "min_lr",
    "cosine_warmup_with_min_lr": "min_lr",
    "warmup_stable_decay": "num_decay_steps",
}


@pytest.mark.parametrize("kind", [each.value for each in SchedulerType])
def test_a_schedule_says_what_it_needs(kind, tmp_path):
    args = {"output_dir": str(tmp_path), **CPU, "lr_scheduler_type": kind, "eval_strategy": "epoch"}
    if kind not in NEEDY:
        SFTConfig(**args)
        return
    with pytest.raises(ConfigError, match=f"lr_scheduler_kwargs={{}} .*lr_scheduler_type='{kind}'.*{NEEDY[kind]}"):
        SFTConfig(**args)


def test_a_plateau_has_a_least_rate_for_each_group(tmp_path):
    args = {"output_dir": str(tmp_path), **CPU, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    given = {"min_lr": [1e-6, 1e-7], "patience": 2}
    assert SFTConfig(**args, lr_scheduler_kwargs=given).lr_scheduler_kwargs == given
    with pytest.raises(ConfigError, match=r"'patence'.* Did you mean 'patience'\? It takes mode, factor, patience"):
        SFTConfig(**args, lr_scheduler_kwargs={"patence": 2})


def test_a_file_of_options_may_be_a_path(tmp_path):
    (tmp_path / "a.json").write_text('{"even_batches": false}')
    args = SFTConfig(output_dir=str(tmp_path), **CPU, accelerator_config=tmp_path / "a.json")
    assert args.accelerator_config.even_batches is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nope": 1}, "'nope'"),
        ({"attn_implementaton": "sdpa"}, "'attn_implementaton'. Did you mean 'attn_implementation'"),
        ({"hidden_sizes": 8}, "'hidden_sizes'. Did you mean 'hidden_size'"),
    ],
)
def test_unknown_arguments_of_the_model(options, words, saved, tmp_path):
    args = {"output_dir": str(tmp_path), **CPU}
    with pytest.raises(ConfigError, match=f"^model_init_kwargs: .*{words}"):
        SFTTrainer(saved, SFTConfig(**args, model_init_kwargs=options), train_dataset=TEXTS)
    with pytest.raises(ConfigError, match=f"^ref_model_init_kwargs: .*{words}"):
        DPOTrainer(saved, saved, DPOConfig(**args, ref_model_init_kwargs=options), train_dataset=PAIRS)


def test_arguments_of_the_reference_have_no_effect_without_one(make_model, tokenizer, tmp_path, caplog):
    args = DPOConfig(output_dir=str(tmp_path), **CPU, ref_model_init_kwargs={"dtype": "float32"})
    DPOTrainer(make_model("llama"), args=args, train_dataset=PAIRS, processing_class=tokenizer)
    assert "ref_model_init_kwargs has no effect" in caplog.text


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"attn_implementation": "flash_attention_2"}])
@pytest.mark.parametrize("name", ["model_init_kwargs", "ref_model_init_kwargs"])
def test_a_package_that_loading_needs_is_told_at_once(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.imports.is_available", lambda module: False)
    monkeypatch.setattr("trl.models.attention_packages.is_installed", lambda package: False)
    with pytest.raises(MissingPackageError, match=f"{next(iter(options))}.* needs "):
        DPOConfig(output_dir=str(tmp_path), **CPU, **{name: options})


def test_attention_is_given_by_name(tmp_path):
    with pytest.raises(ConfigError, match="attn_implementation=3: give a name"):
        SFTConfig(output_dir=str(tmp_path), **CPU, model_init_kwargs={"attn_implementation": {"": 3}})
