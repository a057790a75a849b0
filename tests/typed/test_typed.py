"""What editors and interactive shells see of configurations and trainers. `calls.py` is what type checkers see."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import trl
from trl.option_types import describe_fields, settable
from trl.trainers import arguments

CONFIGS = [name for name in trl.__all__ if name.endswith("Config") and name.replace("Config", "Trainer") in trl.__all__]
CLASSIC = {"DDPOConfig", "AlignPropConfig"}
"""Configurations of classic trainers, which are plain dataclasses."""
CONFIGS = [name for name in CONFIGS if name not in CLASSIC]
OPEN = {"DiffusionDDPOTrainer", "DiffusionDPOTrainer", "DiffusionGRPOTrainer", "DiffusionNFTTrainer", "RFTTrainer"}
"""Trainers that hand on keywords which are checked when they are called, and not by type checkers."""
TRAINERS = [name.replace("Config", "Trainer") for name in CONFIGS]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_signature_of_a_configuration_is_its_fields(name):
    config = getattr(trl, name)
    parameters = inspect.signature(config).parameters
    assert set(parameters) == {field.name for field in settable(config) if field.init}
    assert parameters["learning_rate"].default == config.learning_rate


@pytest.mark.parametrize("name", CONFIGS)
def test_the_documentation_of_a_configuration_lists_its_fields(name):
    config = getattr(trl, name)
    lines = config.__doc__.splitlines()
    for field in settable(config):
        assert not field.init or any(line.startswith(f"{field.name}: ") for line in lines)
    assert inspect.getdoc(config) == inspect.cleandoc(config.__doc__)


def test_a_field_is_documented_by_what_stands_under_it():
    HfArgumentParser(trl.SFTConfig)  # writes other types into the fields
    describe_fields.cache_clear()
    lines = trl.SFTConfig.__doc__.splitlines()
    at = lines.index("max_length: int | None = 1024")
    assert (
        lines[at + 1].strip()
        == "Most tokens per row; longer rows are cut by `truncation_mode`, and counted. None: no limit."
    )


@pytest.mark.parametrize("name", [name for name in TRAINERS if name not in OPEN])
def test_a_trainer_takes_no_keyword_that_type_checkers_do_not_know(name):
    for parameter in inspect.signature(getattr(trl, name)).parameters.values():
        assert parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            assert str(parameter.annotation).startswith("Unpack[")


def own_keys(keywords: type) -> set[str]:
    return set(keywords.__annotations__) - set(arguments.ClassicOptions.__annotations__)


def test_typed_keywords_are_arguments_and_options():
    classic = set(arguments.ClassicOptions.__annotations__)
    known: set[str] = set()
    for config in (trl.SFTConfig, trl.DPOConfig, trl.RewardConfig):
        known |= {field.name for field in dataclasses.fields(config)} | set(config.ALIASES)
    assert classic <= known
    keywords = inspect.signature(trl.BaseTrainer).parameters.values()
    assert own_keys(arguments.TrainerKeywords) == {p.name for p in keywords if p.kind is inspect.Parameter.KEYWORD_ONLY}
    online = (
        set(inspect.signature(trl.OnlineTrainer).parameters) | own_keys(arguments.TrainerKeywords) | {"rollout_func"}
    )
    for each in (arguments.OnlineKeywords, arguments.OnlineDPOKeywords, arguments.PPOKeywords):
        assert own_keys(each) <= online


def test_the_package_says_that_it_is_typed():
    assert Path(inspect.getfile(trl)).with_name("py.typed").is_file()
