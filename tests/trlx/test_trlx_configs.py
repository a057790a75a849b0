"""Configurations of trlX: defaults, YAML, dicts, changes by dotted keys, and what is refused."""

from __future__ import annotations

import json
import logging as python_logging
from dataclasses import dataclass

import pytest

import trlx
from trl.errors import ConfigError
from trlx.data.configs import SECTIONS, TRLConfig
from trlx.data.default_configs import (
    default_ilql_config,
    default_nemo_1_3b_config,
    default_ppo_config,
    default_sft_config,
)
from trlx.data.method_configs import MethodConfig, get_method, register_method
from trlx.models.modeling_ilql import ILQLConfig
from trlx.models.modeling_ppo import PPOConfig
from trlx.pipeline import register_datapipeline
from trlx.pipeline.offline_pipeline import PromptPipeline
from trlx.trainer import BaseRLTrainer, register_trainer
from trlx.trainer.accelerate_rft_trainer import RFTConfig
from trlx.trainer.accelerate_sft_trainer import SFTConfig
from trlx.utils import Clock, logging, significant
from trlx.utils.loading import get_pipeline, get_trainer

DEFAULTS = {"ppo": default_ppo_config, "ilql": default_ilql_config, "sft": default_sft_config}

YAML = """
method:
  name: ppoconfig
  init_kl_coef: 5e-2
  gen_kwargs: {max_new_tokens: 9, do_sample: true}
model:
  model_path: gpt2
  num_layers_unfrozen: 2
tokenizer:
  tokenizer_path: gpt2
optimizer:
  name: adamw
  kwargs: {lr: 1e-4, betas: [0.9, 0.95]}
scheduler:
  name: cosine_annealing
  kwargs: {T_max: 1e12, eta_min: 1.0e-4}
train:
  seq_length: 48
  epochs: 10
  total_steps: 80
  batch_size: 8
  checkpoint_interval: 100
  eval_interval: 20
  tracker: null
"""


def test_defaults_are_those_that_scripts_rely_on():
    ppo, ilql, sft = (make() for make in DEFAULTS.values())
    assert (ppo.train.seq_length, ppo.train.total_steps, ppo.train.batch_size) == (1024, 10000, 32)
    assert (ilql.train.seq_length, ilql.train.total_steps, ilql.train.batch_size) == (64, 1000, 128)
    assert (sft.train.seq_length, sft.train.total_steps, sft.train.batch_size) == (1024, 1000, 8)
    assert [config.train.checkpoint_interval for config in (ppo, ilql, sft)] == [10000, 1000, 10000]
    assert [config.model.num_layers_unfrozen for config in (ppo, ilql, sft)] == [2, -1, -1]
    assert [config.optimizer.kwargs["lr"] for config in (ppo, ilql, sft)] == [3e-5, 5e-5, 1e-4]
    assert ppo.scheduler.kwargs == {"T_max": 1e12, "eta_min": 3e-5}
    assert (ppo.method.init_kl_coef, ppo.method.cliprange_reward, ppo.method.vf_coef) == (0.001, 10, 1.0)
    assert ilql.method.gen_kwargs == {"max_new_tokens": 56, "top_k": 20, "beta": 1, "temperature": 1.0}
    assert (ppo.train.seed, ppo.train.checkpoint_dir, ppo.train.tracker) == (1000, "ckpts", "wandb")


@pytest.mark.parametrize("name", DEFAULTS)
def test_to_dicts_and_back(name):
    config = DEFAULTS[name]()
    assert TRLConfig.from_dict(config.to_dict()) == config
    assert json.loads(str(config))["train"]["batch_size"] == config.train.batch_size
    config.to_dict()["method"]["gen_kwargs"]["top_k"] = 1
    assert config.method.gen_kwargs["top_k"] != 1


def test_a_default_is_nobody_else_s():
    config = default_ppo_config()
    config.method.gen_kwargs["top_k"] = 7
    assert default_ppo_config().method.gen_kwargs["top_k"] == 0


def test_yaml(tmp_path):
    (tmp_path / "ppo.yml").write_text(YAML)
    config = TRLConfig.load_yaml(tmp_path / "ppo.yml")
    assert isinstance(config.method, PPOConfig)
    assert config.method.init_kl_coef == 0.05
    assert config.optimizer.kwargs == {"lr": 1e-4, "betas": [0.9, 0.95]}
    assert config.scheduler.kwargs["T_max"] == 1e12
    assert config.train.seed == 1000
    assert TRLConfig.update(config, {"train.seed": 2}).train.seed == 2


@pytest.mark.parametrize("base", [default_ilql_config(), default_ilql_config().to_dict()], ids=["config", "dict"])
def test_changes(base):
    changed = TRLConfig.update(
        base,
        {"optimizer.kwargs.lr": 1e-6, "method": {"tau": 0.9}, "method.gen_kwargs.beta": [0, 1], "train.seed": 3},
    )
    assert changed.optimizer.kwargs == {**default_ilql_config().optimizer.kwargs, "lr": 1e-6}
    assert (changed.method.tau, changed.method.alpha) == (0.9, 0.001)
    assert changed.method.gen_kwargs == {"max_new_tokens": 56, "top_k": 20, "beta": [0, 1], "temperature": 1.0}
    assert changed.train.seed == 3
    assert default_ilql_config().method.tau == 0.7


def test_evolve_leaves_the_old_one_alone():
    config = default_sft_config()
    changed = config.evolve(train={"batch_size": 4}, method={"gen_kwargs": {"max_new_tokens": 100}})
    assert (changed.train.batch_size, config.train.batch_size) == (4, 8)
    assert changed.method.gen_kwargs["max_new_tokens"] == 100


def test_methods_go_by_name():
    assert get_method("ppoconfig") is PPOConfig
    assert get_method("ILQLConfig") is ILQLConfig
    assert get_method("SFTConfig") is SFTConfig
    assert get_method("rftconfig") is RFTConfig


def test_one_s_own_classes_go_by_name():
    @register_method
    @dataclass
    class MineConfig(MethodConfig):
        name: str = "MineConfig"
        strength: float = 1.0

    @register_trainer("MyTrainer")
    class Trainer(BaseRLTrainer):
        pass

    @register_datapipeline
    class MyPipeline(PromptPipeline):
        pass

    config = TRLConfig.update(default_ppo_config(), {})
    config = TRLConfig.from_dict({**config.to_dict(), "method": {"name": "mineconfig", "strength": 2.0}})
    assert config.method == MineConfig(name="mineconfig", strength=2.0)
    assert get_trainer("mytrainer") is Trainer
    assert get_pipeline("MYPIPELINE") is MyPipeline


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method.init_kl_coeff": 1}, "PPOConfig has no parameter 'init_kl_coeff'. Did you mean 'init_kl_coef'"),
        ({"trian.seed": 1}, "The configuration has no section 'trian'. Did you mean 'train'"),
        ({"train": {"sed": 1}}, "TrainConfig has no parameter 'sed'. Did you mean 'seed'"),
        ({"optimizer.lr": 1}, "OptimizerConfig has no parameter 'lr'"),
        ({"train.batch_size": 0}, "train.batch_size=0: give a number of at least 1"),
        ({"tokenizer.padding_side": "middle"}, "Unknown tokenizer.padding_side 'middle'. Known: left, right"),
        ({"method.name": "PPOConfg"}, "Unknown method 'PPOConfg'. Did you mean 'PPOConfig'"),
    ],
)
def test_what_is_not_there_is_refused(change, words):
    with pytest.raises(ConfigError, match=words) as refused:
        TRLConfig.update(default_ppo_config(), change)
    assert isinstance(refused.value, ValueError)


def test_what_is_missing_is_said(tmp_path):
    whole = default_ppo_config().to_dict()
    with pytest.raises(ConfigError, match="The configuration lacks method: it has the sections method, model"):
        TRLConfig.from_dict({name: whole[name] for name in SECTIONS if name != "method"})
    with pytest.raises(ConfigError, match="method.name is missing: give PPOConfig, ILQLConfig"):
        TRLConfig.from_dict({**whole, "method": {}})
    with pytest.raises(ConfigError, match="TrainConfig needs 'total_steps', 'seq_length'"):
        TRLConfig.from_dict({**whole, "train": {"epochs": 1}})
    with pytest.raises(ConfigError, match="there is no such file"):
        TRLConfig.load_yaml(tmp_path / "none.yml")
    (tmp_path / "list.yml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list: a configuration is a mapping of sections"):
        TRLConfig.load_yaml(tmp_path / "list.yml")
    (tmp_path / "broken.yml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken.yml is not YAML"):
        TRLConfig.load_yaml(tmp_path / "broken.yml")


def test_nemo_is_somewhere_else():
    with pytest.raises(ConfigError, match="NeMo's trainers are not supported"):
        default_nemo_1_3b_config()
    with pytest.raises(ConfigError, match="NeMoPPOTrainer is not supported: use AcceleratePPOTrainer"):
        get_trainer("NeMoPPOTrainer")


def test_a_misspelt_trainer_gets_a_suggestion():
    with pytest.raises(ConfigError, match="Unknown trainer 'AcceleratePPOTrainr'. Did you mean 'AcceleratePPOTrainer'"):
        get_trainer("AcceleratePPOTrainr")


# ---- logging and small things ----


@pytest.fixture
def levels():
    roots = [python_logging.getLogger(name) for name in ("trlx", "trl")]
    before = [(root, root.level) for root in roots]
    yield
    for root, level in before:
        root.setLevel(level)
    logging.disable_default_handler()
    logging.enable_progress_bar()


def test_verbosity_is_of_both_packages(levels):
    trlx.logging.set_verbosity(trlx.logging.ERROR)
    assert trlx.logging.get_verbosity() == logging.ERROR
    assert python_logging.getLogger("trl").level == logging.ERROR
    logging.set_verbosity_info()
    assert python_logging.getLogger("trlx").level == logging.INFO


def test_loggers_speak_for_ranks(levels, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    logger = logging.get_logger("trlx.test")
    logging.set_verbosity_info()
    logger.info("of the first")
    logger.info("of the second", ranks=[1])
    logger.info("of all", ranks=[-1])
    assert capsys.readouterr().err.splitlines() == ["[RANK 1] of the second", "[RANK 1] of all"]


def test_the_environment_sets_the_level(levels, monkeypatch):
    logging.disable_default_handler()
    monkeypatch.setenv("TRLX_VERBOSITY", "warning")
    assert logging.get_verbosity() == logging.WARNING
    logging.disable_default_handler()
    monkeypatch.setenv("TRLX_VERBOSITY", "warming")
    with pytest.raises(ConfigError, match="Unknown TRLX_VERBOSITY 'warming'. Did you mean 'warning'"):
        logging.get_verbosity()


def test_progress_bars_can_be_left_out(levels):
    trlx.logging.disable_progress_bar()
    assert not logging.is_progress_bar_enabled()


def test_small_things():
    clock = Clock()
    clock.tick(10)
    assert clock.get_stat(n_samp=10) == clock.total_time
    assert significant(1234.5) == 1200.0
    assert significant("text") == "text"
