"""No method of `transformers.Trainer` can be overridden in vain: it is called, or overriding it is refused."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable

import pytest
from datasets import Dataset
from transformers import Trainer

import trl
from tests.conftest import make_tokenizer
from trl.compat.hooks import HOOKS
from trl.errors import ConfigError
from trl.trainers.base import BaseTrainer

TRAINERS = [getattr(trl, name) for name in trl.__all__ if name.endswith("Trainer")]
METHODS = {name for name, found in inspect.getmembers(Trainer, callable) if not hasattr(object, name)}
FOR_USERS = {
    *["end", "get_learning_rates", "get_num_trainable_parameters", "get_optimizer_group", "hyperparameter_search"],
    *["log_metrics", "metrics_format", "pop_callback", "save_metrics", "save_state"],
}
"""Methods that are called by nobody else."""
BEHIND_REFUSED_OPTIONS = {"_prepare_input", "_tune_save_checkpoint", "call_model_init"}


@functools.cache
def named_in(function) -> set[tuple[str, bool]]:
    """Attributes that a function's source names, and whether `super()` is asked for them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {(node.attr, ast.unparse(node.value).startswith("super(")) for node in attributes}


def source_of(member):
    """The function behind a member of a class; None for data."""
    member = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
    return inspect.unwrap(member) if inspect.isfunction(inspect.unwrap(member)) else None


def reached(cls: type, names: Iterable[str]) -> set[str]:
    """Members of a class that are named by those `names`, or by members that are named, as its `__mro__` finds them."""
    found, waiting = set(), [(name, -1) for name in names]
    while waiting:
        name, after = waiting.pop()
        place = next((i for i, base in enumerate(cls.__mro__) if i > after and name in vars(base)), None)
        if place is None or (name, place) in found:
            continue
        found.add((name, place))
        if (function := source_of(vars(cls.__mro__[place])[name])) is not None and place < len(cls.__mro__) - 1:
            waiting += [(other, place if by_super else -1) for other, by_super in named_in(function)]
    return {name for name, _ in found}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_method_is_called_or_refused(trainer):
    refused = HOOKS.keys() | trainer.uncalled.keys()
    never = METHODS - reached(trainer, {"__init__", "train", "evaluate", "predict", *FOR_USERS})
    assert never <= refused
    assert refused & METHODS <= never | BEHIND_REFUSED_OPTIONS


@pytest.mark.parametrize(("trainer", "name"), [(each, name) for each in TRAINERS for name in each.uncalled])
def test_a_trainer_refuses_overrides_of_its_own(trainer, name):
    with pytest.raises(ConfigError, match=rf"Mine\.{name} would never be called"):
        type("Mine", (trainer,), {name: lambda self, *_: None})


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_every_trainer_refuses_what_none_calls(name):
    for trainer in (trl.SFTTrainer, trl.DiffusionDPOTrainer, type("Between", (trl.PPOTrainer,), {})):
        with pytest.raises(ConfigError, match=rf"Mine\.{name} would never be called"):
            type("Mine", (trainer,), {name: lambda self, *_: None})


def test_a_method_that_a_script_sets_on_a_trainer_is_refused(make_model, tmp_path, monkeypatch):
    args = trl.DPOConfig(output_dir=str(tmp_path), report_to=[], bf16=False, html_report=False, max_steps=1)
    rows = Dataset.from_dict({"prompt": ["Why"] * 4, "chosen": [" so"] * 4, "rejected": [" no"] * 4})
    make = functools.partial(trl.DPOTrainer, make_model("llama"), None, args, None, rows, None, make_tokenizer())
    trainer = make()
    with pytest.raises(AttributeError, match=r"DPOTrainer\.tokenize_row is of another release"):
        trainer.tokenize_row({})
    with pytest.raises(AttributeError, match="has no attribute 'tokenise_row'"):
        trainer.tokenise_row({})
    with pytest.raises(ConfigError, match=r"DPOTrainer\.dpo_loss would never be called"):
        trainer.dpo_loss = lambda *_: None
    monkeypatch.setattr(trl.DPOTrainer, "concatenated_forward", lambda *_: None, raising=False)
    with pytest.raises(ConfigError, match=r"DPOTrainer\.concatenated_forward would never be called"):
        make()


OTHER_ARGUMENTS = {"create_model_card", "push_to_hub", "_get_dataloader", "_init_training_state"}
"""Methods of trainers that have arguments of their own."""


@pytest.mark.parametrize("trainer", [trainer for trainer in TRAINERS if issubclass(trainer, BaseTrainer)])
def test_overrides_may_pass_on_positional_arguments(trainer):
    for name in METHODS - OTHER_ARGUMENTS:
        function, plain = getattr(trainer, name), getattr(Trainer, name)
        if inspect.isfunction(plain) and function.__module__.startswith("trl."):
            kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            count = sum(parameter.kind in kinds for parameter in inspect.signature(plain).parameters.values())
            inspect.signature(function).bind(*range(count))
