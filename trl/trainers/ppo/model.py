"""Checks the arguments of PPOTrainer, and builds its separate value model."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification

from trl.errors import ConfigError
from trl.models.layouts import why_not
from trl.models.load import load_config, load_model
from trl.models.patching import evaluating
from trl.models.score import score, unwrap
from trl.models.value_heads.auto_models import WithValueHead
from trl.models.value_heads.heads import ValueModel
from trl.models.varlen import VARLEN, has_varlen, switch
from trl.trainers.ppo.config import PPOConfig

logger = logging.getLogger(__name__)


def value_network(given: str | nn.Module, args: PPOConfig) -> ValueModel:
    """The given model, or the one loaded by the given name, as a separate value network with a value head."""
    if isinstance(given, WithValueHead):
        return ValueModel(ValueModel.of(given.pretrained_model).model, given.head_options, given.v_head.summary)
    if isinstance(given, str):
        whole = load_config(given, **args.loading()).is_encoder_decoder
        kind = {} if whole else {"auto_class": AutoModelForSequenceClassification, "num_labels": 1}
        given = load_model(given, **args.loading(), **kind)
    return ValueModel.of(given)


def layout_with_value_model(model: WithValueHead, layout: str, args: PPOConfig) -> str:
    """The policy's `layout`, or "padded" with a warning if the value network does not support it.

    Raises ConfigError if the options name the unsupported layout.
    """
    network, own = model.v_head.model, unwrap(model).config._attn_implementation
    if own == VARLEN and has_varlen(network):
        switch(network, VARLEN)
    attention = network.config._attn_implementation
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
            raise ConfigError(
                f"value_model and {name} are the same object, but value_model is trained: give it a copy."
            )
    for name, other, both in (
        ("config", "args", (config, args)),
        ("reward_funcs", "reward_model", (reward_funcs, reward_model)),
    ):
        if None not in both:
            raise ConfigError(f"{name} and {other} are two names of one argument: give one of them.")
