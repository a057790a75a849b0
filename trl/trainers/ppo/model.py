"""What PPO trains: a language model with a value head, a value branch, or a value model of its own."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification

from trl.errors import ConfigError
from trl.models.adapters import with_adapters
from trl.models.layouts import why_not
from trl.models.load import load_config, load_model
from trl.models.patching import evaluating
from trl.models.score import score, unwrap
from trl.models.value_heads.auto_models import WithValueHead, value_head_class, with_value_head
from trl.models.value_heads.heads import ValueBranch, ValueModel
from trl.trainers.ppo.config import PPOConfig

logger = logging.getLogger(__name__)


def load_with_value_head(name: str, args: PPOConfig, quantization_config: Any) -> WithValueHead:
    """The model `name`, with the value head that is saved beside it or a new one."""
    kwargs = args.loading(args.model_init_kwargs)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    config = load_config(name, trust_remote_code=kwargs["trust_remote_code"], revision=kwargs.get("revision"))
    return value_head_class(config).from_pretrained(name, **kwargs)


def policy_with_value(
    model: nn.Module, value_model: str | nn.Module | None, args: PPOConfig, peft_config: Any
) -> WithValueHead:
    """`model` with a value head, an adapter where `peft_config` is given, and the `value_model` or branch asked for."""
    if isinstance(model, WithValueHead):
        model.pretrained_model = with_adapters(model.pretrained_model, peft_config, part=args.adapted_part)
    else:
        model = with_value_head(with_adapters(model, peft_config, part=args.adapted_part))
        if value_model is None:
            logger.warning(f"This {type(unwrap(model)).__name__} has no value head: a new one is put on.")
    if value_model is not None:
        model.v_head = _value_network(value_model, args)
    elif args.num_value_layers and not isinstance(model.v_head, ValueBranch):
        model.branch(args.num_value_layers)
    model.has_new_adapter = model.has_new_adapter or peft_config is not None
    return model


def _value_network(given: str | nn.Module, args: PPOConfig) -> ValueModel:
    """A value head on the network of its own that was given."""
    if isinstance(given, WithValueHead):
        return ValueModel(ValueModel.of(given.pretrained_model).model, given.head_options, given.v_head.summary)
    if isinstance(given, str):
        whole = load_config(given, **args.loading()).is_encoder_decoder
        kind = {} if whole else {"auto_class": AutoModelForSequenceClassification, "num_labels": 1}
        given = load_model(given, **args.loading(), **kind)
    return ValueModel.of(given)


def layout_with_value_model(model: WithValueHead, layout: str, args: PPOConfig) -> str:
    """The policy's `layout`, or "padded" with a warning where the value's network cannot be run in it.

    Raises ConfigError where the layout was asked for.
    """
    network = model.v_head.model
    attention, own = network.config._attn_implementation, unwrap(model).config._attn_implementation
    if layout == "shared" and attention != own:
        reason = f"its attention implementation is {attention!r}, the policy's {own!r}"
    else:
        with evaluating(model):
            reason = why_not(network, layout, measure=lambda _, batch: score(model, batch, want={"value"}).value)
    if not reason:
        return layout
    if args.layout != "auto":
        raise ConfigError(f"layout={layout!r} does not work with this value_model: {reason}.")
    logger.warning(f"Layout 'padded' (the value model does not work with {layout!r}: {reason}).")
    return "padded"


def check_arguments(
    config: Any, args: Any, model: Any, ref_model: Any, reward_funcs: Any, reward_model: Any, value_model: Any
) -> None:
    """Raise ConfigError for arguments of `PPOTrainer` that are missing, the same object, or given twice."""
    if isinstance(config, str | nn.Module):
        raise ConfigError("The first argument of PPOTrainer is its configuration: PPOTrainer(config, model, ...).")
    if model is None:
        raise ConfigError("model is missing: PPOTrainer(config, model, ...) trains a model, or the name of one.")
    if ref_model is not None and ref_model is model and not isinstance(model, str):
        raise ConfigError("model and ref_model are the same object, so both would be trained: leave ref_model out.")
    others = {"model": model, "ref_model": ref_model, "reward_funcs": reward_funcs, "reward_model": reward_model}
    for name, other in others.items():
        if value_model is other and isinstance(other, nn.Module):
            raise ConfigError(f"value_model and {name} are the same object, but the value is trained: give it a copy.")
    for name, other, both in (
        ("config", "args", (config, args)),
        ("reward_funcs", "reward_model", (reward_funcs, reward_model)),
    ):
        if None not in both:
            raise ConfigError(f"{name} and {other} are two names of one argument: give one of them.")
