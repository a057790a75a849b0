"""Options that follow from others follow from the latest ones, however these were set."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from transformers import SchedulerType

from trl import CPOConfig, GRPOConfig, PPOConfig, SFTConfig
from trl.errors import ConfigError
from trl.trainers.options import resolve_args

CPU = {"use_cpu": True, "report_to": "none"}


def resolved(args, **options):
    return resolve_args(type(args), args, options, trainer="Trainer")


def test_keywords_beside_a_configuration_are_as_if_in_it(tmp_path):
    args = GRPOConfig(str(tmp_path), **CPU)
    assert resolved(args, loss_type="dr_grpo").loss_aggregation == "constant"
    assert resolved(args, scale_rewards=False).scale_rewards == "none"
    with pytest.raises(ConfigError, match="no multiple of num_generations=3"):
        resolved(args, num_generations=3)
    made = resolved(SFTConfig(str(tmp_path), **CPU), eval_strategy="steps", lr_scheduler_type="cosine", logging_steps=7)
    assert (made.do_eval, made.eval_steps, made.lr_scheduler_type) == (True, 7, SchedulerType.COSINE)
    with pytest.raises(ConfigError, match="packing=True needs max_length"):
        resolved(SFTConfig(str(tmp_path), **CPU), packing=True, max_length=None)


def test_so_are_options_that_are_set_later(tmp_path):
    args = GRPOConfig(str(tmp_path), **CPU)
    args.loss_type, args.of_the_script = "grpo", 3
    made = resolved(args)
    assert (made.loss_aggregation, made.of_the_script) == ("sequence", 3)
    assert (args.loss_aggregation, resolved(made).changed()) == ("token", {})


def made_by_a_script(**fields):
    """A class with fields of its own, whose code runs once for each object: the constructor takes no options."""

    @dataclasses.dataclass
    class Own(SFTConfig):
        lr: dataclasses.InitVar[float] = 0.5
        total: int = dataclasses.field(init=False, default=3)
        stamp: object = dataclasses.field(default_factory=object)

        def __init__(self, folder, lr):
            self.lr, self.stamp = lr, object()
            super().__init__(folder, learning_rate=0.9, **CPU)
            self.learning_rate = lr

        def __post_init__(self, *_):
            self.output_dir = f"{self.output_dir}/run"
            super().__post_init__()

    return Own(**fields)


def test_classes_of_scripts_are_not_constructed_again(tmp_path):
    args = made_by_a_script(folder=str(tmp_path), lr=0.5)
    args.total = 4
    made = resolved(args, eval_strategy="steps")
    assert (made.learning_rate, made.total, made.stamp) == (0.5, 4, args.stamp)
    assert (made.output_dir, made.eval_steps) == (f"{tmp_path}/run", 10)
    assert resolved(args, learning_rate=0.1).learning_rate == 0.1


def test_options_of_classes_of_scripts_follow_from_others(tmp_path):
    class Own(GRPOConfig):
        def __post_init__(self):
            super().__post_init__()
            self.loss_type, self.weights = "dr_grpo", torch.ones(3)

    args = Own(str(tmp_path), **CPU)
    args.weights = torch.zeros(3)
    made = resolved(args)
    assert (made.loss_aggregation, made.weights) == ("constant", args.weights)


def test_mappings_that_are_changed_in_place(tmp_path):
    args = SFTConfig(str(tmp_path), model_init_kwargs='{"dtype": "float32"}', **CPU)
    args.model_init_kwargs["use_cache"] = False
    assert resolved(args, max_steps=3).model_init_kwargs == {"dtype": "float32", "use_cache": False}


@pytest.mark.parametrize(
    ("given", "later", "sizes"),
    [
        ({"mini_batch_size": 4}, {"per_device_train_batch_size": 2}, (8, 2)),
        ({"forward_batch_size": 4}, {"mini_batch_size": 2}, (8, 2)),
        ({"mini_batch_size": 4, "steps_per_generation": 2}, {"batch_size": 16}, (16, 4)),
    ],
)
def test_the_latest_of_several_names(given, later, sizes):
    args = PPOConfig(**{"batch_size": 8, **given}, **CPU)
    for name, value in later.items():
        setattr(args, name, value)
    made = resolved(args)
    assert (made.batch_size, made.mini_batch_size) == sizes


def test_sizes_of_ppo_under_all_their_names():
    args = PPOConfig(batch_size=8, mini_batch_size=2, **CPU)
    made = resolved(args, batch_size=16)
    assert (made.batch_size, made.mini_batch_size, made.steps_per_generation) == (16, 2, 8)
    made = resolved(args, mini_batch_size=4, ppo_epochs=7)
    assert (made.per_device_train_batch_size, made.steps_per_generation, made.num_iterations) == (4, 2, 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mini_batch_size": 4}, "mini_batch_size=4 and per_device_train_batch_size=2 are names of one option"),
        ({"ppo_epochs": 7}, "ppo_epochs=7 and num_iterations=5"),
        ({"batch_size": 16}, "batch_size=16 is not mini_batch_size × steps_per_generation = 2 × 4"),
    ],
)
def test_a_size_that_another_name_contradicts(options, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(PPOConfig(batch_size=8, mini_batch_size=2, ppo_epochs=5, **CPU), **options)


def test_defaults_that_depend_on_other_options_survive_a_replacement(tmp_path):
    args = GRPOConfig(str(tmp_path), **CPU)
    assert dataclasses.replace(args, use_vllm=True).make_algorithm().correction is not None
    made = dataclasses.replace(CPOConfig(str(tmp_path), **CPU), loss_type="alphapo")
    assert made.make_algorithm().terms == [("alphapo", 1.0)]


def test_copies_remember_what_was_given(tmp_path):
    args = GRPOConfig(str(tmp_path), generation_kwargs={"top_k": 3}, **CPU)
    for each in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert each.changed() == {}
        assert resolved(each, loss_type="dr_grpo").loss_aggregation == "constant"


def test_a_configuration_survives_json(tmp_path):
    args = SFTConfig(str(tmp_path), pad_token="<unk>", **CPU)
    again = SFTConfig(**json.loads(args.to_json_string()))
    assert (again.pad_token, again.eos_token, again.hub_token) == ("<unk>", None, None)
    assert SFTConfig(str(tmp_path), hub_token="secret", **CPU).to_dict()["hub_token"] == "<HUB_TOKEN>"
