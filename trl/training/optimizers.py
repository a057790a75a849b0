"""Optimizer steps that would change nothing: those of another model's parameters, and those that are rounded away."""

from __future__ import annotations

import logging

import torch
from torch import nn

from trl.errors import ConfigError, listed

logger = logging.getLogger(__name__)

SHOWN = 4


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Say which trained parameters an optimizer that was given does not hold. Raises ConfigError where it holds none."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name, parameter in trained if id(parameter) not in held]
    if len(missing) == len(trained):
        raise ConfigError(
            f"The optimizer that was given holds none of the {len(trained)} parameters that train: it was made of another "
            "model, or before peft_config put the adapter on. Make it of the model that is given (with its adapter), or leave "
            "optimizers out; optimizer_cls_and_kwargs=(class, {…}) has one made here."
        )
    if missing:
        logger.warning(
            f"{len(missing)} of {len(trained)} trained parameters are not in the optimizer that was given, so they never "
            f"change: {listed(missing, SHOWN)}."
        )


def warn_of_rounded_steps(model: nn.Module, learning_rate: float) -> None:
    """Say that weights in half precision do not take small steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = [parameter for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)]
    if not half:
        return
    count, dtype = sum(parameter.numel() for parameter in half), half[0].dtype
    part = round(2 / torch.finfo(dtype).eps)
    logger.warning(
        f"{count:,} of the parameters that train are in {str(dtype).removeprefix('torch.')}: steps below a part in {part:,} of a "
        f"weight are rounded away, and Adam's are about learning_rate={learning_rate:g}. Load the model in float32 "
        "(dtype='float32'; bf16=True still computes in bfloat16), or train an adapter."
    )
