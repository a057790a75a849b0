"""Configurations that scripts derive from those of trainers, and values and attributes that they give them."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import InitVar, dataclass
from typing import Literal

import numpy as np
import pytest

from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig
from trl.errors import ConfigError

CPU = {"use_cpu": True, "report_to": "none", "html_report": False}


@dataclass
class Own(SFTConfig):
    alpha: float = 2.0
    gamma: float = 2.0
    horizon: int = -1
    target: str = "all"
    judge: str = "none"
    loss_weights: float = 0.0
    stop_token: str = "eos"
    evaluation_strategy: str = "mine"
    group_by_length: bool = True
    mode: Literal["fast", "slow"] = None
    hidden: InitVar[int] = 0

    def __post_init__(self, hidden):
        super().__post_init__()
        self.tools = [hidden]

    @property
    def broken(self):
        return self.alpha.nothing


class Plain(SFTConfig):
    def __init__(self, extra=1, **options):
        super().__init__(**options)
        self.extra = extra


def test_options_of_a_subclass_mean_what_it_says(tmp_path, caplog):
    args = Own(output_dir=str(tmp_path), hidden=3, alpha=-3.0, horizon=-2, **CPU)
    assert (args.alpha, args.horizon, args.tools, args.stop_token) == (-3.0, -2, [3], "eos")
    assert (args.evaluation_strategy, args.eval_strategy.value, args.group_by_length) == ("mine", "no", True)
    assert caplog.messages == []
    with pytest.raises(ConfigError, match="Unknown mode 'slwo'"):
        Own(output_dir=str(tmp_path), mode="slwo", **CPU)
    with pytest.raises(ConfigError, match=r"learning_rate=-1\.0: give 0 or more"):
        Own(output_dir=str(tmp_path), learning_rate=-1.0, **CPU)


def test_a_default_of_a_subclass_is_checked_as_the_option_that_it_is(tmp_path):
    other = dataclasses.make_dataclass("Other", [("beta", float, -1.0)], bases=(DPOConfig,))
    with pytest.raises(ConfigError, match=r"beta=-1\.0"):
        other(output_dir=str(tmp_path), **CPU)


def test_a_subclass_has_copies(tmp_path):
    args = Own(output_dir=str(tmp_path), gamma=3.0, **CPU)
    assert pickle.loads(pickle.dumps(args)) == copy.deepcopy(args) == dataclasses.replace(args) == args
    assert args.to_dict()["gamma"] == dataclasses.asdict(args)["gamma"] == 3.0


def test_an_initialiser_of_a_subclass_takes_what_it_names(tmp_path):
    args = Plain(extra=4, output_dir=str(tmp_path), max_seq_length=8, **CPU)
    assert (args.extra, args.max_length) == (4, 8)


def test_a_property_tells_its_own_error(tmp_path):
    with pytest.raises(AttributeError, match="'float' object has no attribute 'nothing'"):
        Own(output_dir=str(tmp_path), **CPU).broken  # noqa: B018


def test_a_class_without_a_docstring_has_its_fields_as_documentation():
    assert Own.__doc__.startswith("Own.\n\n")
    assert "gamma: float = 2.0" in Own.__doc__
    Plain.__doc__ = "Words."
    assert Plain.__doc__ == "Words."


@pytest.mark.parametrize("config", [ModelConfig, ScriptArguments])
def test_what_is_no_option_of_a_trainer_may_be_set_elsewhere(config):
    args = config()
    args.device_map, args.total_episodes = "auto", 3
    assert (args.device_map, args.total_episodes) == ("auto", 3)


@pytest.mark.parametrize(
    ("name", "value"), [("max_steps", 1e3), ("seed", np.int64(4)), ("max_length", 16.0), ("save_total_limit", 2.0)]
)
def test_whole_numbers_are_integers(name, value, tmp_path):
    found = getattr(SFTConfig(output_dir=str(tmp_path), **CPU, **{name: value}), name)
    assert (type(found), found) == (int, value)


@pytest.mark.parametrize("name", ["output_dir", "image_folder", "chat_template_path"])
def test_paths_are_text(name, tmp_path):
    args = SFTConfig(**{"output_dir": str(tmp_path), **CPU, name: tmp_path})
    assert getattr(args, name) == str(tmp_path)


def test_numbers_of_numpy_have_bounds(tmp_path):
    assert SFTConfig(output_dir=str(tmp_path), weight_decay=np.float32(0.5), **CPU).weight_decay == 0.5
    with pytest.raises(ConfigError, match="weight_decay=-0.5"):
        SFTConfig(output_dir=str(tmp_path), weight_decay=np.float32(-0.5), **CPU)
