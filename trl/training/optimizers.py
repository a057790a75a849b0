"""Memory of optimizer states, and warnings of optimizers or precisions with which training would change nothing."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from trl.errors import ConfigError, listed

logger = logging.getLogger(__name__)

SHOWN = 4
STATES = {"adamw": 2, "adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1, "lion": 1, "sgd": 0}
"""Optimizer → number of states per parameter, each of the parameter's shape and dtype."""


class StateSizes:
    """Called with a parameter, returns the bytes of each of its optimizer states."""

    def __init__(self, args: TrainingArguments) -> None:
        self.name, self.device = str(getattr(args.optim, "value", args.optim)), args.device.type

    def __call__(self, parameter: Tensor) -> list[int]:
        if "adafactor" in self.name:
            rows, columns = (parameter.shape[:-1].numel(), parameter.shape[-1]) if parameter.dim() > 1 else (0, 0)
            return [4 * (rows + columns) or 4 * parameter.numel()]
        if "8bit" in self.name:
            return [parameter.numel()] * (1 if "lion" in self.name else 2)
        return [parameter.nbytes] * STATES.get(self.name.removeprefix("paged_").removesuffix("_32bit"), 2)

    def scratch(self, model: nn.Module) -> int:
        """Bytes of temporary memory of an update: torch's AdamW, if not fused, computes the roots of all second moments
        at once."""
        if self.device == "cpu" or self.name not in ("adamw", "adamw_torch"):
            return 0
        return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Warn of trained parameters that the user's optimizer does not have. Raises ConfigError if it has none of them."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name, parameter in trained if id(parameter) not in held]
    if len(missing) == len(trained):
        raise ConfigError(
            f"The optimizer in optimizers has none of the {len(trained)} trained parameters: it was created for another model, or "
            "before peft_config added the adapter. Create it for the model that is passed (with its adapter), or leave "
            "optimizers out; optimizer_cls_and_kwargs=(class, {…}) lets the trainer create it."
        )
    if missing:
        logger.warning(
            f"{len(missing)} of {len(trained)} trained parameters are not in the optimizer that was passed, so they never "
            f"change: {listed(missing, SHOWN)}."
        )


def warn_of_rounded_steps(model: nn.Module, learning_rate: float) -> None:
    """Warn if trained weights are in half precision, which rounds small updates away."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = [parameter for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)]
    if not half:
        return
    count, dtype = sum(parameter.numel() for parameter in half), half[0].dtype
    part = round(2 / torch.finfo(dtype).eps)
    logger.warning(
        f"{count:,} trained parameters are in {str(dtype).removeprefix('torch.')}: updates smaller than 1/{part:,} of a weight "
        f"are rounded away, and those of Adam are about learning_rate={learning_rate:g}. Load the model in float32 "
        "(dtype='float32'; bf16=True still computes in bfloat16), or train an adapter."
    )


def check_unscaled(model: nn.Module) -> None:
    """Raises ConfigError for trained weights in float16, whose gradients torch's gradient scaler does not unscale."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if names:
        raise ConfigError(
            f"fp16=True scales gradients up, which needs trained weights in float32, but {len(names)} are in float16: "
            f"{listed(names, SHOWN)}. Load the model in float32 (dtype='float32'; fp16=True still computes in float16), or "
            "train an adapter."
        )
