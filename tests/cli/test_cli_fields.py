"""Options read from source are those of the live classes."""

import textwrap
from dataclasses import dataclass, field

import pytest

from trl.cli import source
from trl.cli.commands import load, methods, tools
from trl.cli.fields import REQUIRED, aliases_in_source, merge_options, options_in_source, options_of
from trl.cli.source import COMPUTED
from trl.cli.themes import by_theme, is_common
from trl.option_types import OptionType
from trl.trainers.diffusion.config import OF_LANGUAGE

REFERENCES = sorted({reference for method in methods().values() for reference in method.argument_classes})


@pytest.mark.parametrize("reference", REFERENCES)
def test_source_and_live_class_agree(reference):
    live = {option.name: option for option in options_of(load(reference))}
    read = {option.name: option for option in options_in_source(reference)}
    assert list(read) == list(live)
    for name, option in read.items():
        assert option.kind == live[name].kind, name
        if option.default is not COMPUTED:
            assert option.default == live[name].default, name
        assert option.help == live[name].help, name


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_field_of_ours_is_documented(reference):
    undocumented = [option.name for option in options_in_source(reference) if not option.help]
    assert undocumented == []


@pytest.mark.parametrize("reference", REFERENCES)
def test_aliases_are_those_of_the_class(reference):
    assert aliases_in_source(reference) == getattr(load(reference), "ALIASES", {})


@pytest.mark.parametrize(
    ("method", "name", "formulas"),
    [
        ("sft", "loss_type", "trl.algorithms.sft:LOSSES"),
        ("sft", "truncation_mode", "trl.data.trees:TRUNCATIONS"),
        ("reward", "truncation_mode", "trl.data.trees:TRUNCATIONS"),
        ("dpo", "loss_type", "trl.algorithms.dpo:LOSSES"),
        ("dpo", "f_divergence_type", "trl.algorithms.f_dpo:F_DIVERGENCES"),
        ("kto", "loss_type", "trl.algorithms.kto:LOSSES"),
        ("ppo", "kl_penalty", "trl.algorithms.ppo:PENALTIES"),
        ("grpo", "loss_type", "trl.trainers.grpo:LOSS_TYPES"),
        ("grpo", "scale_rewards", "trl.algorithms.advantages:SCALES"),
        ("grpo", "kl_estimator", "trl.algorithms.policy_gradient:KL"),
        ("grpo", "importance_sampling_level", "trl.algorithms.grpo:RATIO_LEVELS"),
        ("grpo", "importance_sampling_mode", "trl.algorithms.importance:MODES"),
        ("grpo", "loss_aggregation", "trl.trainers.online_config:AVERAGING"),
        ("grpo", "on_reward_error", "trl.rewards.call:ON_ERROR"),
        ("online-dpo", "loss_type", "trl.algorithms.dpo:LOSSES"),
    ],
)
def test_choices_are_the_names_of_the_formulas(method, name, formulas):
    options = {option.name: option for option in methods()[method].options()}
    assert sorted(options[name].kind.choices) == sorted(load(formulas))


def test_choices_of_layout_are_the_layouts():
    (layout,) = [option for option in methods()["sft"].options() if option.name == "layout"]
    assert sorted(layout.kind.choices) == sorted([*load("trl.data.layout:LAYOUTS"), "auto"])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose files are read; the reader's memory is emptied around it."""
    folder = tmp_path / "readable"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "READ", ("readable",))
    source.read_module.cache_clear()
    yield folder
    source.read_module.cache_clear()


def test_inheritance_across_files(package):
    (package / "base.py").write_text(
        textwrap.dedent('''
        from dataclasses import dataclass, field
        from enum import Enum
        from typing import ClassVar

        NAMES = {"old_rate": "rate"}

        class Pace(Enum):
            SLOW = "slow"
            FAST = "fast"

        @dataclass
        class Base:
            ALIASES: ClassVar[dict[str, str]] = NAMES

            name: str
            """Its name."""

            rate: float = 1.0
            """How
            fast."""

            pace: Pace | str = field(default="slow", metadata={"help": "At what" " pace."})
            tags: list[str] = field(default_factory=lambda: ["a"])
            hidden: int = field(default=1, init=False)
        ''')
    )
    (package / "derived.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        from .base import Base

        LIMIT = 2

        @dataclass
        class Derived(Base):
            ALIASES = {**Base.ALIASES, "older": ""}
            rate: float = -LIMIT
            pace = "fast"
            made: int = len("abc")
        """)
    )
    options = {option.name: option for option in options_in_source("readable.derived:Derived")}
    assert list(options) == ["name", "rate", "pace", "tags", "made"]
    assert options["name"].default is REQUIRED
    assert (options["rate"].help, options["rate"].owner) == ("How fast.", "Derived")
    assert (options["pace"].default, options["pace"].help) == ("fast", "At what pace.")
    assert options["pace"].kind == OptionType(choices=("slow", "fast"))
    assert options["tags"].default == ["a"]
    assert options["made"].default is COMPUTED
    assert aliases_in_source("readable.derived:Derived") == {"old_rate": "rate", "older": ""}


@dataclass
class Mine:
    """Arguments of somebody's script."""

    depth: int = 3
    """How deep."""

    colour: str = field(default="red", metadata={"help": "Which colour."})


def test_live_class_is_documented_by_literal_or_metadata():
    assert [(o.name, o.default, o.help, o.owner) for o in options_of(Mine)] == [
        ("depth", 3, "How deep.", "Mine"),
        ("colour", "red", "Which colour.", "Mine"),
    ]


def test_shared_names_are_one_option():
    @dataclass
    class Other:
        depth: int = 5

    merged = merge_options(options_of(Mine), options_of(Other))
    assert [(o.name, o.default) for o in merged] == [("depth", 3), ("colour", "red")]


def test_themes_hold_every_option_once():
    options = methods()["sft"].options()
    grouped = by_theme(options)
    assert sorted(o.name for group in grouped.values() for o in group) == sorted(o.name for o in options)
    assert list(grouped)[:2] == ["Most used", "Data"]
    assert [o.name for o in grouped["Most used"]][:2] == ["model_name_or_path", "dataset_name"]
    assert "Other" not in grouped or len(grouped["Other"]) < 5
    common = {o.name for o in options if is_common(o)}
    assert {"dataset_name", "use_peft", "loss_type", "learning_rate"} <= common
    assert not {"ddp_timeout", "adam_beta1"} & common


def test_options_of_a_method_come_before_those_that_trainers_share():
    order = [option.name for option in by_theme(methods()["grpo"].options())["Method"]]
    assert order.index("beta") < order.index("zero_variance") < order.index("sync_ref_model")
    assert next(iter(by_theme(tools()["check"].known_options()))) == "Check"


def test_names_of_the_classic_loop_are_in_the_whole_help_alone():
    options = methods()["ppo"].options()
    assert not {"model_name", "reward_model", "query_dataset"} & {o.name for o in options if is_common(o)}
    assert {"batch_size", "init_kl_coef"} <= {o.name for o in options if is_common(o)}


def test_help_of_diffusion_models_has_no_option_that_they_refuse():
    refused = {*OF_LANGUAGE, "load_in_4bit", "attn_implementation", "deepspeed"} - {"image_folder"}
    for name in ("ddpo", "diffusion-grpo", "diffusion-nft", "diffusion-dpo"):
        assert not refused & {option.name for option in methods()[name].shown()}
    assert refused <= {option.name for option in methods()["ddpo"].options()}
