"""Options that older scripts know, those that a device rules out, and what is shown first."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch
from huggingface_hub.errors import InferenceTimeoutError, OfflineModeIsEnabled
from transformers import Trainer
from transformers.training_args import OptimizerNames

from trl import CPOConfig, DPOConfig, GRPOConfig, PPOConfig, RLOOConfig, SFTConfig, TrlParser
from trl.cli.commands import load, methods
from trl.cli.hub import HubError, check_model_on_hub, push_explained
from trl.cli.main import main
from trl.data.formats import TAKEN_BY
from trl.errors import ConfigError, MissingPackageError
from trl.trainers.option_checks import check_full_batch
from trl.trainers.option_effects import CONDITIONS
from trl.trainers.options import resolve_args
from trl.training.checkpoint import remove_checkpoints
from trl.training.nonfinite import SkippedSteps

CPU = {"use_cpu": True, "report_to": "none"}


@pytest.fixture
def without_packages(monkeypatch):
    """No optional package is installed."""
    monkeypatch.setattr("trl.imports.is_available", lambda module: False)
    monkeypatch.setattr("trl.trainers.option_checks.get_available_reporting_integrations", list)


@pytest.mark.parametrize(("command", "own"), [("sft", "max_length"), ("grpo", "reward_funcs")])
def test_fifteen_options_come_first(command, own, capsys):
    main([command, "--help"])
    titles = re.split(r"\n\n(?=\S)", capsys.readouterr().out)
    top = next(text for text in titles if text.startswith("Most used"))
    named = re.findall(r"^  --(\w+)", top, flags=re.MULTILINE)
    assert len(named) == 15
    assert {"model_name_or_path", "dataset_name", "output_dir", "learning_rate", own} <= set(named)
    assert titles.index(top) < next(i for i, text in enumerate(titles) if text.startswith("Data"))
    assert all(text.count("--learning_rate ") == 0 for text in titles if text.startswith("Optimisation"))


def test_a_name_that_is_suggested_is_an_option_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match="GRPOConfig has no option 'max_seq_length'") as refused:
        GRPOConfig(output_dir=str(tmp_path), max_seq_length=8, **CPU)
    assert "or 'max_seq_length'" not in str(refused.value)
    assert "mean 'max_seq_length'" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_safetensors": False}, "save_safetensors=False: weights are always saved as safetensors"),
        ({"fp16": True}, "fp16=True needs an accelerator"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 are both set"),
        ({"tf32": True}, "tf32=True needs an NVIDIA GPU"),
        ({"logging_steps": 0}, "logging_steps=0: .*--logging_strategy no"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: give a finite number"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' is text"),
        ({"max_length": "512"}, "max_length='512' is text"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"weight_decay": float("nan")}, "weight_decay=nan: give a finite number"),
        ({"max_steps": 0}, "max_steps=0 trains nothing"),
        ({"max_length": -1}, "max_length=-1: give 1 or more"),
        ({"report_to": "wandbb"}, "report_to='wandbb' is no tracker. Did you mean 'wandb'"),
    ],
)
def test_refused_when_the_configuration_is_made(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(output_dir=str(tmp_path), **{**CPU, **options})


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [(GRPOConfig, "beta", -1.0), (GRPOConfig, "delta", 0.5), (RLOOConfig, "missing_eos_penalty", -1.0)]
    + [(PPOConfig, name, -0.1) for name in ("init_kl_coef", "cliprange", "vf_coef", "lam")],
)
def test_a_sign_that_would_turn_a_loss_around_is_refused(config, option, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{option}={value}: give "):
        config(output_dir=str(tmp_path), **{**CPU, option: value})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_half_precision_on_a_cpu_has_to_be_meant(tmp_path):
    with pytest.raises(ConfigError, match="bf16=True, but there is no accelerator: .*use_cpu=True"):
        SFTConfig(output_dir=str(tmp_path), **{**CPU, "use_cpu": False, "bf16": True})
    assert SFTConfig(output_dir=str(tmp_path), **CPU, bf16=True).bf16


def test_deepspeed_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.imports.is_available", lambda name: True)
    with pytest.raises(ConfigError, match="deepspeed='nowhere.json': there is no such file"):
        SFTConfig(output_dir=str(tmp_path), **CPU, deepspeed="nowhere.json")


@pytest.mark.parametrize(
    ("options", "install"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, '"trl[deepspeed]"'),
        ({"use_liger_kernel": True}, '"trl[liger]"'),
        ({"optim": "adamw_8bit"}, '"trl[quantization]"'),
        ({"optim": "paged_lion_8bit"}, '"trl[quantization]"'),
        ({"optim": "adamw_torch_8bit"}, "torchao"),
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"optim": "stable_adamw"}, "torch-optimi"),
        ({"report_to": ["trackio"]}, "trackio"),
        ({"report_to": "flyte"}, "flytekit"),
    ],
)
def test_a_missing_package_is_told_when_the_configuration_is_made(options, install, tmp_path, without_packages):
    (name, _), *_ = options.items()
    with pytest.raises(MissingPackageError, match=f"{name}=.*: pip install {re.escape(install)}"):
        SFTConfig(output_dir=str(tmp_path), **{**CPU, **options})


@pytest.mark.parametrize("words", ["--load_in_4bit --use_peft", "--optim adamw_8bit"])
def test_the_command_tells_a_missing_package_before_it_reads_rows(
    words, tmp_path, make_model, without_packages, monkeypatch, capsys
):
    make_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("trl.cli.train.datasets_of", lambda run: pytest.fail("rows are read"))
    (tmp_path / "rows.jsonl").write_text('{"text": "A fox."}\n')
    given = f"sft --model_name_or_path {tmp_path} --dataset_name {tmp_path / 'rows.jsonl'} --use_cpu {words}"
    assert main([*given.split(), "--output_dir", str(tmp_path / "out")]) == 2
    assert 'needs bitsandbytes: pip install "trl[quantization]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_every_optimizer_whose_package_is_missing_is_known(name, tmp_path, without_packages, make_model):
    """Those that the configuration takes can be created."""
    try:
        args = SFTConfig(output_dir=str(tmp_path), **CPU, optim=name, optim_target_modules=["q_proj"])
    except MissingPackageError:
        return
    Trainer.get_optimizer_cls_and_kwargs(args, make_model("llama"))


def test_older_options_that_ask_for_what_happens_anyway(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **CPU, group_by_length=False, save_safetensors=True)
    assert args.train_sampling_strategy == "random"


def test_older_options_that_have_another_name_and_value_now(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **CPU, group_by_length=True)
    assert args.train_sampling_strategy == "group_by_length"
    args = SFTConfig(output_dir=str(tmp_path), **CPU)
    args.group_by_length = True
    assert args.train_sampling_strategy == "group_by_length"
    with pytest.raises(ConfigError, match="given 'group_by_length' and 'train_sampling_strategy', two names"):
        SFTConfig(output_dir=str(tmp_path), **CPU, group_by_length=True, train_sampling_strategy="sequential")
    with pytest.raises(ConfigError, match="train_sampling_strategy='group_by_length' has no effect on prompts"):
        GRPOConfig(output_dir=str(tmp_path), **CPU, group_by_length=True)


@pytest.mark.parametrize("words", [["--group_by_length"], ["--group_by_length", "True"], ["--config", "older.yaml"]])
def test_older_options_on_the_command_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "older.yaml").write_text("group_by_length: true\n")
    (args,) = TrlParser(SFTConfig).parse_args_and_config(["--output_dir", str(tmp_path), "--use_cpu", *words])
    assert args.train_sampling_strategy == "group_by_length"


def test_the_only_batch_is_not_dropped(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **CPU, dataloader_drop_last=True)
    check_full_batch(args, 8)
    with pytest.raises(ConfigError, match="5 rows do not fill a single one of 8"):
        check_full_batch(args, 5)


def test_every_process_reads_its_own_batches(tmp_path):
    for given in (None, {"split_batches": True}):
        args = SFTConfig(output_dir=str(tmp_path), **CPU, accelerator_config=given)
        assert args.accelerator_config.dispatch_batches is False
        assert args.accelerator_config.split_batches is (given is not None)
    with pytest.raises(
        ConfigError, match="accelerator_config: dispatch_batches=True would send batches from one process"
    ):
        SFTConfig(output_dir=str(tmp_path), **CPU, accelerator_config={"dispatch_batches": True})


def test_intervals_that_nothing_waits_for_may_be_0(tmp_path):
    SFTConfig(output_dir=str(tmp_path), **CPU, logging_strategy="no", logging_steps=0, save_strategy="no", save_steps=0)


def test_a_learning_rate_beyond_all_usual_ones_is_said(tmp_path, caplog):
    SFTConfig(output_dir=str(tmp_path), **CPU, learning_rate=2e5)
    assert "learning_rate=200000 is outside the usual range" in caplog.text
    caplog.clear()
    SFTConfig(output_dir=str(tmp_path), **CPU, learning_rate=1e-3)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (GRPOConfig, {"loss_type": "sapo", "epsilon": 0.3}, "epsilon=0.3 has no effect without a loss_type that clips"),
        (GRPOConfig, {"sapo_temperature_pos": 2.0}, "sapo_temperature_pos=2.0 has no effect without loss_type='sapo'"),
        (GRPOConfig, {"kl_estimator": "k1"}, "kl_estimator='k1' has no effect without beta above 0"),
        (GRPOConfig, {"kl_estimator": "k1", "beta": 0.1, "epsilon": 0.3}, ""),
        (RLOOConfig, {"epsilon": 0.3}, ""),
        (RLOOConfig, {"vllm_server_port": 9}, "vllm_server_port=9 has no effect without use_vllm=True"),
        (DPOConfig, {"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect without loss_type='simpo' or 'alphapo'"),
        (DPOConfig, {"loss_type": ["simpo", "sft"], "simpo_gamma": 1.0}, ""),
        (CPOConfig, {"cpo_alpha": 0.5}, ""),
    ],
)
def test_an_option_that_another_one_leaves_without_effect_is_said(config, options, said, tmp_path, caplog):
    config(output_dir=str(tmp_path), **CPU, **options)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def test_errors_name_commands_that_there_are():
    assert {name for names in TAKEN_BY.values() for name in names} <= set(methods())


def test_every_option_that_depends_on_another_is_one():
    configs = [load(method.config) for method in methods().values()]
    assert set(CONDITIONS) <= {field.name for config in configs for field in dataclasses.fields(config)}


def test_logging_dir_is_where_tensorboard_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    SFTConfig(output_dir=str(tmp_path), **CPU, logging_dir=str(tmp_path / "logs"))
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "logs")


def test_overwriting_removes_checkpoints_and_nothing_else(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "notes"):
        (tmp_path / name).mkdir()
    remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_skipped_steps_are_no_part_of_the_mean():
    """Six losses of 1 and four skipped steps: transformers' mean is 0.6, that of the steps taken 1."""
    steps = SkippedSteps()
    for i in range(10):
        steps.add(skipped=i >= 6)
    assert steps.corrected_mean(0.6, 10) == pytest.approx(1.0)
    assert steps.corrected_mean(0.0, 4) != steps.corrected_mean(0.0, 4), "no step was taken: NaN"


# ---- the hub ----


def test_a_model_that_is_nowhere_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="'org/none' is no folder here and not in the cache, and the hub is not queried"
    ):
        check_model_on_hub("org/none", "main")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InferenceTimeoutError.__bases__[0]("no route"), "the hub cannot be reached"),
        (TimeoutError("late"), r"the hub cannot be reached \(TimeoutError\)"),
        (OfflineModeIsEnabled("off"), "offline mode"),
    ],
)
def test_a_push_that_fails_says_where_the_model_is(error, message):
    with (
        pytest.raises(HubError, match=f"The model is in out, but it was not pushed.*{message}.*hf upload"),
        push_explained("out"),
    ):
        raise error


@pytest.mark.parametrize("count", [0, 1, 3])
def test_check_shows_as_many_rows_as_asked_for(count, tmp_path, monkeypatch, capsys):
    from tests.conftest import MODELS, make_tokenizer

    monkeypatch.chdir(tmp_path)
    MODELS["llama"]().save_pretrained("tiny")
    make_tokenizer().save_pretrained("tiny")
    (tmp_path / "rows.txt").write_text("One.\nTwo.\nThree.\nFour.\n")
    words = ["--model_name_or_path", "tiny", "--dataset_name", "rows.txt", "--use_cpu", "--report_to", "none"]
    assert main(["check", *words, "--rows", str(count)]) == 0
    assert len(re.findall(r"^row \d+:", capsys.readouterr().out, flags=re.MULTILINE)) == count


def test_what_has_no_effect_is_said_once_for_a_configuration_and_its_copies(tmp_path, caplog):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, packing_strategy="wrapped", learning_rate=5.0)
    resolve_args(SFTConfig, args, {}, trainer="SFTTrainer")
    assert [record.message.split()[0] for record in caplog.records] == ["learning_rate=5", "packing_strategy='wrapped'"]
    args.packing_strategy = "bfd_split"
    resolve_args(SFTConfig, args, {}, trainer="SFTTrainer")
    assert "packing_strategy='bfd_split'" in caplog.records[2].message, "what is new is said"
